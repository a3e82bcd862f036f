// Callers in several threads share work through one pool, with all counts of blocks and threads, and
// short and long pauses between jobs, so that helpers are met spinning, asleep, and falling asleep.
// Every block must be done exactly once before `share` returns. Prints the number of jobs.

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "cpu/pool.h"

static int run_caller(int seed, double seconds) {
    std::mt19937 random(seed);
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    int jobs = 0;
    for (; std::chrono::steady_clock::now() < end; ++jobs) {
        const int count = int(random() % 40), threads = 1 + int(random() % 5);
        std::vector<int> done(count, 0);  // of the caller alone: a late helper would write to freed memory
        share(count, threads, [&](std::int64_t block) {
            ++done[block];
            if (block % 7 == 3) std::this_thread::sleep_for(std::chrono::microseconds(block));
        });
        for (int n : done)
            if (n != 1) return std::printf("a block was done %d times\n", n), std::exit(1), 0;
        std::atomic<int> rows{0};
        share_rows(count, threads, [&](std::int64_t) { ++rows; });
        if (rows != count) return std::printf("%d of %d rows\n", rows.load(), count), std::exit(1), 0;
        if (random() % 50 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
    }
    return jobs;
}

int main(int, char **argv) {
    const int callers = std::atoi(argv[1]);
    std::vector<int> jobs(callers, 0);
    std::vector<std::thread> threads;
    for (int i = 0; i < callers; ++i)
        threads.emplace_back([&, i] { jobs[i] = run_caller(i, std::atof(argv[2])); });
    int all = 0;
    for (int i = 0; i < callers; ++i) threads[i].join(), all += jobs[i];
    std::printf("%d jobs\n", all);
}
