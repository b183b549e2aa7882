// Threads for one call: started for it and joined before it returns.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace tso {

// Runs work(task) for every task in [0, num_tasks) on up to num_threads threads, which take tasks as they get free. A task must
// not care which thread runs it. The first exception is rethrown.
template <typename Work>
void parallel_for(int64_t num_tasks, int64_t num_threads, const Work& work) {
    std::atomic<int64_t> next{0};
    std::exception_ptr error;
    std::mutex mutex;
    const auto take_tasks = [&] {
        try {
            for (int64_t task; (task = next.fetch_add(1)) < num_tasks;) work(task);
        } catch (...) {
            next.store(num_tasks);
            const std::lock_guard<std::mutex> lock(mutex);
            if (!error) error = std::current_exception();
        }
    };
    std::vector<std::thread> threads;
    const int64_t count = num_threads < num_tasks ? num_threads : num_tasks;
    try {
        while (static_cast<int64_t>(threads.size()) < count - 1) threads.emplace_back(take_tasks);
    } catch (const std::system_error&) {
        // The system grants no more threads; those that run share the work.
    }
    take_tasks();
    for (std::thread& thread : threads) thread.join();
    if (error) std::rethrow_exception(error);
}

}  // namespace tso
