import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.nio.file.StandardOpenOption;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.CyclicBarrier;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.atomic.AtomicLong;

/** Threads that allocate, sort, lock and meet at a barrier. */
public class Load {
    static final Path SHARED = Path.of("/shared");
    static final int THREADS = 4;
    static final AtomicLong rounds = new AtomicLong();
    static final ConcurrentHashMap<Integer, Long> sums = new ConcurrentHashMap<>();
    static long locked;
    static volatile boolean stop;

    static void end(String verdict) throws Exception {
        Path file = SHARED.resolve("verdict.new");
        Files.writeString(file, verdict);
        Files.move(file, SHARED.resolve("verdict"), StandardCopyOption.ATOMIC_MOVE);
        Runtime.getRuntime().halt(0);
    }

    static long work(int seed) {
        List<Long> numbers = new ArrayList<>();
        long x = seed + 1;
        for (int i = 0; i < 20_000; i++) {
            x = x * 6364136223846793005L + 1442695040888963407L;
            numbers.add(x >>> 20);
        }
        numbers.sort(null);
        long sum = 0;
        for (long number : numbers) {
            sum = sum * 31 + number;
        }
        return sum;
    }

    static void run(int seed, CyclicBarrier barrier) {
        try {
            while (!stop) {
                long sum = work(seed);
                Long before = sums.putIfAbsent(seed, sum);
                if (before != null && before != sum) {
                    throw new IllegalStateException("thread " + seed + " computes something else");
                }
                synchronized (Load.class) {
                    locked++;
                }
                barrier.await();
            }
        } catch (Throwable error) {
            try {
                end(error.toString());
            } catch (Exception second) {
                throw new IllegalStateException(second);
            }
        }
    }

    public static void main(String[] args) throws Exception {
        CyclicBarrier barrier = new CyclicBarrier(THREADS, () -> {
            try {
                if (rounds.incrementAndGet() * THREADS != locked) {
                    end("counted " + locked + " under the lock in " + rounds + " rounds");
                }
                Files.writeString(SHARED.resolve("rounds"), ".", StandardOpenOption.CREATE,
                        StandardOpenOption.APPEND);
                stop = Files.exists(SHARED.resolve("stop"));
            } catch (Exception error) {
                throw new IllegalStateException(error);
            }
        });
        List<Thread> threads = new ArrayList<>();
        for (int i = 0; i < THREADS; i++) {
            int seed = i;
            threads.add(new Thread(() -> run(seed, barrier)));
        }
        for (Thread thread : threads) {
            thread.start();
        }
        for (Thread thread : threads) {
            thread.join();
        }
        end("ok");
    }
}
