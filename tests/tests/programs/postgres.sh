#!/bin/bash
# PostgreSQL under pgbench: what was added to accounts is what the history says.
end() {
    echo -n "$1" >/shared/verdict.new
    mv /shared/verdict.new /shared/verdict
    exit
}
ask() { psql -X -h /tmp -d postgres -At -c "$1"; }

postgres -D /shared/data &
server=$!
until pg_isready -q -h /tmp; do
    kill -0 $server || end "postgres did not start"
    sleep 0.1
done
pgbench -q -i -h /tmp postgres || end "pgbench -i failed"
until [ -e /shared/stop ]; do
    pgbench -n -c 4 -j 2 -t 100 -h /tmp postgres >/shared/pgbench.log 2>&1 ||
        end "pgbench: $(</shared/pgbench.log)"
    echo -n . >>/shared/rounds
done
[ "$(ask 'select count(*) % 400 from pgbench_history')" = 0 ] || end "transactions are missing"
for table in accounts tellers branches; do
    sum=$(ask "select sum(${table:0:1}balance) from pgbench_$table")
    [ "$sum" = "$(ask 'select sum(delta) from pgbench_history')" ] || end "$table do not add up"
done
kill -INT $server
wait $server || end "postgres ended with $?"
end ok
