// Warp operations, from the values of all lanes to a result for each: shuffles, votes, reductions; and atomics.
//
// Reading a lane that has returned, does not exist or is not in the mask is undefined on the hardware. Here it
// gives 0xff bytes (NaN).
#pragma once
#include "machine.h"

namespace emulator {

struct Exchange {
    unsigned char value[16], result[16];
    unsigned source; // the absolute lane
};

inline void exchange(void* const operands[32]) {
    for (int i = 0; i < 32; ++i) {
        Exchange* mine = static_cast<Exchange*>(operands[i]);
        if (mine == nullptr) continue;
        const Exchange* source = static_cast<const Exchange*>(operands[mine->source]);
        if (source != nullptr) memcpy(mine->result, source->value, sizeof mine->result);
        else memset(mine->result, 0xff, sizeof mine->result);
    }
}

template <class T>
T exchanged(uint32_t mask, T value, unsigned source, const Site* site) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "the hardware shuffles 4 or 8 bytes");
    Exchange mine;
    memcpy(mine.value, &value, sizeof value);
    mine.source = source & 31;
    collective(mask, exchange, &mine, site);
    memcpy(&value, mine.result, sizeof value);
    return value;
}

// The lane that a shuffle reads, inside its segment of `width` lanes; its own lane at the segment's end.
inline unsigned lane_at(unsigned source, int width) {
    if (width <= 0 || width > 32 || (width & (width - 1)) != 0) die("a shuffle of width %d: must be a power of two up to 32", width);
    return (lane() & ~(width - 1u)) | (source & (width - 1u));
}
inline unsigned lane_up(unsigned delta, int width) { return (lane() & (width - 1u)) < delta ? lane() : lane() - delta; }
inline unsigned lane_down(unsigned delta, int width) {
    return (lane() & (width - 1u)) + delta >= static_cast<unsigned>(width) ? lane() : lane() + delta;
}
inline unsigned lane_xor(unsigned bits, int width) {
    const unsigned other = lane() ^ bits;
    return other >= (lane() & ~(width - 1u)) + width ? lane() : other;
}

// Five shuffles between lanes whose numbers differ by 16, 8, 4, 2 and 1, each followed by Merge, in one step. The
// result has the bits of `x = Merge::of(x, __shfl_xor_sync(0xffffffff, x, offset))` in a loop, with a fifth of its
// switches.
template <class T, class Merge>
void butterfly(void* const operands[32]) {
    T values[32], merged[32];
    memset(static_cast<void*>(values), 0xff, sizeof values);
    for (int i = 0; i < 32; ++i) {
        if (operands[i] != nullptr) memcpy(static_cast<void*>(&values[i]), operands[i], sizeof(T));
    }
    for (int offset = 16; offset > 0; offset >>= 1) {
        for (int i = 0; i < 32; ++i) merged[i] = Merge::of(values[i], values[i ^ offset]);
        for (int i = 0; i < 32; ++i) {
            if (operands[i] != nullptr) values[i] = merged[i];
        }
    }
    for (int i = 0; i < 32; ++i) {
        if (operands[i] != nullptr) memcpy(operands[i], static_cast<void*>(&values[i]), sizeof(T));
    }
}

template <class Merge, class T>
T merged_warp(T value, const Site* site) {
    collective(0xffffffffu, butterfly<T, Merge>, &value, site);
    return value;
}

struct Vote {
    unsigned value;
    unsigned ballot, sum, least, greatest, all_bits, any_bits;
};

inline void vote(void* const operands[32]) {
    Vote total = {0, 0, 0, ~0u, 0, ~0u, 0};
    for (int i = 0; i < 32; ++i) {
        const Vote* lane = static_cast<const Vote*>(operands[i]);
        if (lane == nullptr) continue;
        total.ballot |= (lane->value != 0 ? 1u : 0u) << i;
        total.sum += lane->value;
        total.least = lane->value < total.least ? lane->value : total.least;
        total.greatest = lane->value > total.greatest ? lane->value : total.greatest;
        total.all_bits &= lane->value;
        total.any_bits |= lane->value;
    }
    for (int i = 0; i < 32; ++i) {
        if (operands[i] != nullptr) *static_cast<Vote*>(operands[i]) = total;
    }
}

inline Vote voted(uint32_t mask, unsigned value, const Site* site) {
    Vote mine = {value, 0, 0, 0, 0, 0, 0};
    collective(mask, vote, &mine, site);
    return mine;
}

struct SyncWarp {
    const Site* site;
    void operator()(uint32_t mask = 0xffffffffu) const { collective(mask, order_warp, thread, site); }
};

// Blocks run on several host threads, so an atomic must be one there too.
template <class T, class Change>
T atomically(T* address, Change change) {
    typedef typename std::conditional<sizeof(T) == 8, uint64_t, typename std::conditional<sizeof(T) == 4, uint32_t, uint16_t>::type>::type Bits;
    if (!is_shared(address, sizeof *address)) check_waited("changes global memory");
    Bits* place = reinterpret_cast<Bits*>(address);
    Bits old = __atomic_load_n(place, __ATOMIC_RELAXED), wanted;
    do {
        wanted = emulator_bits<Bits>(static_cast<T>(change(emulator_bits<T>(old))));
    } while (!__atomic_compare_exchange_n(place, &old, wanted, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
    return emulator_bits<T>(old);
}

template <class T>
struct Same {
    typedef T type;
};

}  // namespace emulator

// The width is the last argument and may be left out, as in CUDA.
#define __shfl_sync(...) emulator_shfl(EMULATOR_SITE("__shfl_sync"), __VA_ARGS__)
#define __shfl_up_sync(...) emulator_shfl_up(EMULATOR_SITE("__shfl_up_sync"), __VA_ARGS__)
#define __shfl_down_sync(...) emulator_shfl_down(EMULATOR_SITE("__shfl_down_sync"), __VA_ARGS__)
#define __shfl_xor_sync(...) emulator_shfl_xor(EMULATOR_SITE("__shfl_xor_sync"), __VA_ARGS__)
template <class T>
T emulator_shfl(const emulator::Site* site, unsigned mask, T value, int source, int width = 32) {
    return emulator::exchanged(mask, value, emulator::lane_at(static_cast<unsigned>(source), width), site);
}
template <class T>
T emulator_shfl_up(const emulator::Site* site, unsigned mask, T value, unsigned delta, int width = 32) {
    return emulator::exchanged(mask, value, emulator::lane_up(delta, width), site);
}
template <class T>
T emulator_shfl_down(const emulator::Site* site, unsigned mask, T value, unsigned delta, int width = 32) {
    return emulator::exchanged(mask, value, emulator::lane_down(delta, width), site);
}
template <class T>
T emulator_shfl_xor(const emulator::Site* site, unsigned mask, T value, int bits, int width = 32) {
    return emulator::exchanged(mask, value, emulator::lane_xor(static_cast<unsigned>(bits), width), site);
}

#define __syncwarp(...) (emulator::SyncWarp{EMULATOR_SITE("__syncwarp")}(__VA_ARGS__))
#define __ballot_sync(mask, value) (emulator::voted(mask, (value) ? 1u : 0u, EMULATOR_SITE("__ballot_sync")).ballot)
#define __any_sync(mask, value) (emulator::voted(mask, (value) ? 1u : 0u, EMULATOR_SITE("__any_sync")).ballot != 0)
#define __all_sync(mask, value) (emulator::voted(mask, (value) ? 1u : 0u, EMULATOR_SITE("__all_sync")).least != 0)
#define __reduce_add_sync(mask, value) (emulator::voted(mask, value, EMULATOR_SITE("__reduce_add_sync")).sum)
#define __reduce_min_sync(mask, value) (emulator::voted(mask, value, EMULATOR_SITE("__reduce_min_sync")).least)
#define __reduce_max_sync(mask, value) (emulator::voted(mask, value, EMULATOR_SITE("__reduce_max_sync")).greatest)
#define __reduce_and_sync(mask, value) (emulator::voted(mask, value, EMULATOR_SITE("__reduce_and_sync")).all_bits)
#define __reduce_or_sync(mask, value) (emulator::voted(mask, value, EMULATOR_SITE("__reduce_or_sync")).any_bits)

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
template <class T>
T atomicAdd(T* address, typename emulator::Same<T>::type value) {
    return emulator::atomically(address, [=](T old) { return old + value; });
}
template <class T>
T atomicSub(T* address, typename emulator::Same<T>::type value) {
    return emulator::atomically(address, [=](T old) { return old - value; });
}
template <class T>
T atomicMax(T* address, typename emulator::Same<T>::type value) {
    return emulator::atomically(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, typename emulator::Same<T>::type value) {
    return emulator::atomically(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicOr(T* address, typename emulator::Same<T>::type value) {
    return emulator::atomically(address, [=](T old) { return old | value; });
}
template <class T>
T atomicAnd(T* address, typename emulator::Same<T>::type value) {
    return emulator::atomically(address, [=](T old) { return old & value; });
}
template <class T>
T atomicExch(T* address, typename emulator::Same<T>::type value) {
    return emulator::atomically(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, typename emulator::Same<T>::type compare, typename emulator::Same<T>::type value) {
    return emulator::atomically(address, [=](T old) { return old == compare ? value : old; });
}
