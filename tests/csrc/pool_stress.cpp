// Callers in several threads share work through one pool, with all counts of blocks and threads, and
// short and long pauses between jobs, so that helpers are met spinning, asleep, and falling asleep.
// Every block must be done exactly once before `share` returns. Prints the number of jobs. Before and
// after, jobs have as many threads as they ask for: in a fork of a process with helpers too, and while
// another caller is held to one.

#include <sys/wait.h>
#include <unistd.h>

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

// Whether two threads work on a job of two blocks at once: each block waits for the other to begin.
static bool meets(std::chrono::milliseconds within) {
    std::atomic<int> begun{0}, met{0};
    const auto end = std::chrono::steady_clock::now() + within;
    share(2, 2, [&](std::int64_t) {
        ++begun;
        while (begun != 2 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
        met += begun == 2;
    });
    return met == 2;
}

static void expect(bool holds, const char *what) {
    if (!holds) std::printf("%s\n", what), std::exit(1);
}

static void check_threads() {
    using namespace std::chrono_literals;
    expect(meets(20s), "a job of two blocks has one thread");
    if (const pid_t child = fork(); child == 0) {
        _exit(meets(20s) ? 0 : 1);
    } else {
        int status = -1;
        waitpid(child, &status, 0);
        expect(status == 0, "in a fork a job of two blocks has one thread");
    }
    const FewerThreads one(1);
    expect(!meets(200ms), "a caller that is held to one thread has two");
    bool other = false;
    std::thread([&] { other = meets(20s); }).join();
    expect(other, "a caller is held to one thread because another is");
    {
        const FewerThreads none(1);
    }
    expect(!meets(200ms), "a limit ends with one within it");
}

int main(int, char **argv) {
    check_threads();
    const int callers = std::atoi(argv[1]);
    std::vector<int> jobs(callers, 0);
    std::vector<std::thread> threads;
    for (int i = 0; i < callers; ++i)
        threads.emplace_back([&, i] { jobs[i] = run_caller(i, std::atof(argv[2])); });
    int all = 0;
    for (int i = 0; i < callers; ++i) threads[i].join(), all += jobs[i];
    check_threads();
    std::printf("%d jobs\n", all);
}
