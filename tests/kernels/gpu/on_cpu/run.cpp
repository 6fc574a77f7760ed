// Runs a kernel on a CPU. Macros: SOURCE, its file; KERNEL, its name; CLUSTER_BLOCKS; those of the file.

#include SOURCE

namespace on_cpu {

template <typename... Kinds, size_t... I>
void call(void (*kernel)(Kinds...), void** arguments, std::index_sequence<I...>) {
    kernel(*(Kinds*)arguments[I]...);
}

template <typename... Kinds>
void call(void (*kernel)(Kinds...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<Kinds...>());
}

static thread_local void** given;

void run_thread() {
    call(KERNEL, given);
    current->ended[current->running] = true;
}

void run_block(Place place, u32 threads, void** arguments) {
    Block block;
    current = &block, given = arguments, blockIdx = place;
    block.threads.resize(threads), block.stacks.resize(threads), block.ended.resize(threads);
    block.given.resize(threads), block.awaited.resize(threads), block.warps.resize(threads / 32);
    for (u32 i = 0; i < threads; i++) {
        block.stacks[i].resize(STACK);
        getcontext(&block.threads[i]);
        block.threads[i].uc_stack.ss_sp = block.stacks[i].data();
        block.threads[i].uc_stack.ss_size = STACK;
        block.threads[i].uc_link = &block.scheduler;
        makecontext(&block.threads[i], run_thread, 0);
    }
    cluster->anchors[place.x % cluster->blocks] = &anchor;
    cluster->begun++;
    while (cluster->begun < cluster->blocks) std::this_thread::yield();
    for (u32 turns = 0, left = threads; left; turns++) {
        if (turns == PATIENCE) std::fputs("a thread waits in vain\n", stderr), std::abort();
        for (u32 i = 0; i < threads; i++) {
            if (block.ended[i]) continue;
            block.running = i, threadIdx.x = i;
            swapcontext(&block.scheduler, &block.threads[i]);
            left -= block.ended[i];
        }
        std::this_thread::yield();
    }
}

}  // namespace on_cpu

extern "C" void run(u32 width, u32 height, u32 threads, void** arguments) {
    for (u32 y = 0; y < height; y++)
        for (u32 x = 0; x < width; x += CLUSTER_BLOCKS) {
            on_cpu::Cluster cluster;
            cluster.blocks = CLUSTER_BLOCKS;
            cluster.anchors.resize(CLUSTER_BLOCKS);
            on_cpu::cluster = &cluster;
            std::vector<std::thread> blocks;
            for (u32 i = 0; i < CLUSTER_BLOCKS; i++)
                blocks.emplace_back(on_cpu::run_block, on_cpu::Place{x + i, y}, threads, arguments);
            for (std::thread& block : blocks) block.join();
        }
}
