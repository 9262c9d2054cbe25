"""Transfers between accounts in SQLite: the sum and the book must agree."""

import os
import random
import sqlite3
import traceback

SHARED = "/shared"


def end(verdict):
    with open(f"{SHARED}/verdict.new", "w") as file:
        file.write(verdict)
    os.rename(f"{SHARED}/verdict.new", f"{SHARED}/verdict")


def main():
    # Both hosts are one kernel here: the locks of the one that was left, which
    # is still there for a moment, would stand in the way.
    db = sqlite3.connect(f"file:{SHARED}/db?vfs=unix-none", uri=True, isolation_level=None)
    db.execute("pragma synchronous = off")
    db.execute("create table account (id integer primary key, balance integer)")
    db.execute("create table book (id integer primary key, source, target, amount)")
    db.executemany("insert into account values (?, 1000)", [(n,) for n in range(50)])
    made = 0
    while not os.path.exists(f"{SHARED}/stop"):
        for _ in range(100):
            source, target, amount = *random.sample(range(50), 2), random.randrange(100)
            db.execute("begin")
            db.execute("update account set balance = balance - ? where id = ?", (amount, source))
            db.execute("update account set balance = balance + ? where id = ?", (amount, target))
            db.execute("insert into book values (null, ?, ?, ?)", (source, target, amount))
            db.execute("commit")
            made += 1
        (total,) = db.execute("select sum(balance) from account").fetchone()
        assert total == 50_000, f"the accounts hold {total}"
        with open(f"{SHARED}/rounds", "a") as rounds:
            rounds.write(".")
    assert db.execute("pragma integrity_check").fetchall() == [("ok",)], "it is damaged"
    assert db.execute("select count(*) from book").fetchone() == (made,), "the book has gaps"
    wrong = db.execute(
        """select id from account where balance != 1000
           + (select coalesce(sum(amount), 0) from book where target = account.id)
           - (select coalesce(sum(amount), 0) from book where source = account.id)"""
    ).fetchall()
    assert not wrong, f"accounts and book differ: {wrong}"
    end("ok")


try:
    main()
except BaseException:
    end(traceback.format_exc())
