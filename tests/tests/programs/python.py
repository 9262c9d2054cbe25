"""Threads, asyncio, multiprocessing and subprocesses that check one another."""

import asyncio
import hashlib
import multiprocessing
import os
import subprocess
import threading
import traceback

SHARED = "/shared"


def end(verdict):
    with open(f"{SHARED}/verdict.new", "w") as file:
        file.write(verdict)
    os.rename(f"{SHARED}/verdict.new", f"{SHARED}/verdict")
    os._exit(0)


def checked(work):
    try:
        work()
    except BaseException:
        end(traceback.format_exc())


def chain(seed):
    digest = str(seed).encode()
    for _ in range(2000):
        digest = hashlib.sha256(digest).digest()
    return digest.hex()


class Counter:
    """Counts what all threads together have done."""

    def __init__(self):
        self.changed = threading.Condition()
        self.counts = {}

    def add(self, name):
        with self.changed:
            self.counts[name] = self.counts.get(name, 0) + 1
            self.changed.notify_all()

    def wait_for_all(self, names):
        with self.changed:
            before = dict(self.counts)
            self.changed.wait_for(
                lambda: all(self.counts.get(n, 0) > before.get(n, 0) for n in names)
            )


counter = Counter()


def computing(name):
    expected = chain(name)
    while True:
        assert chain(name) == expected, "a thread computes something else"
        counter.add(name)


async def echo(reader, writer):
    while line := await reader.readline():
        writer.write(line)
        await writer.drain()


async def talking():
    server = await asyncio.start_unix_server(echo, "/tmp/echo")
    async with server:
        reader, writer = await asyncio.open_unix_connection("/tmp/echo")
        n = 0
        while True:
            n += 1
            writer.write(b"%d\n" % n)
            await writer.drain()
            answer = await reader.readline()
            assert answer == b"%d\n" % n, f"{answer} in place of {n}"
            await asyncio.sleep(0.001)
            counter.add("asyncio")


def main():
    names = ["one", "two", "asyncio"]
    with multiprocessing.Pool(2) as pool:
        for name in names[:2]:
            threading.Thread(target=checked, args=(lambda n=name: computing(n),)).start()
        threading.Thread(target=checked, args=(lambda: asyncio.run(talking()),)).start()
        cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        expected = [chain(n) for n in range(8)]
        n = 0
        while not os.path.exists(f"{SHARED}/stop"):
            n += 1
            counter.wait_for_all(names)
            assert pool.map(chain, range(8)) == expected, "the pool computes something else"
            said = subprocess.run(["sh", "-c", f"echo $(({n} * 3))"], capture_output=True)
            assert said.returncode == 0 and said.stdout == b"%d\n" % (n * 3), said
            cat.stdin.write(b"%d\n" % n)
            cat.stdin.flush()
            assert cat.stdout.readline() == b"%d\n" % n, "cat says something else"
            with open(f"{SHARED}/rounds", "a") as rounds:
                rounds.write(".")
        cat.stdin.close()
        assert cat.wait() == 0, "cat failed"
        pool.close()
        pool.join()
    end("ok")


checked(main)
