/* tiles.cuh: the file's blocks of weights become the matrix units' operand, in registers.
 *
 * A warp takes 32 rows by 32 columns at a time: blocks of the same columns from two strips of 16
 * rows. Lane 4 g + t takes rows 4 (g % 4) to + 3 of strip g / 4, as they lie together in the file,
 * and columns 4t to 4t + 3 and 16 + 4t to 16 + 4t + 3. In q4 that is one load of 16 bytes, and the
 * warp's are 512 bytes side by side: the file's layout is the device's.
 *
 * Of the two products of 16 rows that these are, number m has as its rows g and g + 8 the lane's
 * rows 2m and 2m + 1. Its columns are taken in an order of their own, too: in step s (of 16
 * columns) the lane's four are 16 s + 4 t on, so the other operand is read in eights of bytes. The
 * order in which columns are summed does not matter as long as both operands have the same.
 *
 * Codes become halves exactly, being whole numbers; scales come in when a group's sum is done. */
#ifndef TILES_CUH
#define TILES_CUH
#include "device.cuh"
extern "C" {
#include "../llama.h"
#include "../quant.h"
}

/* a[s][m]: step s of product m, as mma() takes it. */
struct operand { uint32_t a[2][2][4]; };

constexpr uint32_t HALVES_1024 = 0x64646464; // as high byte: 1024 + the low byte

template <uint32_t KIND> struct tile;

/* Where lane 4 g + t finds its rows and columns. */
struct seat {
    int g, t, quad; // quad: rows 4 quad to + 3 of the strip
    __device__ seat() : g(lane_number() / 4), t(lane_number() % 4), quad(g % 4) {}
    /* The I-th of its eight in tile NUMBER. */
    __device__ int column(int number, int i) const {
        return number * GROUP + i / 4 * 16 + 4 * t + i % 4;
    }
};

template <bool EVEN> struct tile_4_bits {
    static constexpr bool SCALED = true;
    static constexpr int PARTS = 1, AHEAD = 4;
    uint4 codes; // word i: row i, low halves columns 4t.., high halves 16 + 4t..
    uint2 d;

    __device__ __forceinline__ void load(const uint8_t *strip, int number, int) {
        const seat at;
        const uint8_t *block = strip + (size_t)number * sizeof(block_q4);
        codes = strip ? stream16(block + 32 + at.t * 64 + at.quad * 16) : make_uint4(0, 0, 0, 0);
        d = strip ? stream8(block + at.quad * 8) : make_uint2(0, 0);
    }
    __device__ __forceinline__ uint32_t scale_bits(int row) const {
        return (row < 2 ? d.x : d.y) >> 16 * (row % 2) & 0xffff;
    }
    __device__ __forceinline__ float scale(int row) const {
        return half_to_float((uint16_t)(scale_bits(row) & Q4_SCALE_BITS)) * (1 / Q4_SCALE);
    }
    /* The levels of a word's eight codes, 128 higher: bytes of columns 0 16 1 17 and 2 18 3 19. */
    __device__ __forceinline__ static void levels(uint32_t word, uint32_t u[2]) {
        if (EVEN) { // 16 code + 8
            const uint32_t low = (word << 4 & 0xf0f0f0f0) | 0x08080808;
            const uint32_t high = (word & 0xf0f0f0f0) | 0x08080808;
            u[0] = pick_bytes(low, high, 0x5140);
            u[1] = pick_bytes(low, high, 0x7362);
            return;
        }
        constexpr uint32_t LEVELS[4] = {0x41301b01, 0x766a5e50, 0xa69a8d82, 0xebd5c4b5}; // + 128
        // a pick is among 8 bytes: both halves of the table, then by the code's highest bit
        const uint32_t low = word & 0x77777777, top = (word >> 1 & 0x44444444) | 0x32103210;
        for (int i = 0; i < 2; i++)
            u[i] = pick_bytes(pick_bytes(LEVELS[0], LEVELS[1], low >> 16 * i & 0x7777),
                              pick_bytes(LEVELS[2], LEVELS[3], low >> 16 * i & 0x7777),
                              top >> 16 * i & 0x7777);
    }
    /* Eight codes of one row become level + shift: pairs (0, 1), (2, 3), (16, 17), (18, 19). */
    __device__ __forceinline__ void row(uint32_t word, uint32_t bits, uint32_t out[4]) const {
        uint32_t u[2];
        levels(word, u);
        // -1152 + shift, twice: 1024 + 128 + level comes before it
        const uint32_t offset = 0xe4c0e4c0 - (bits & Q4_SHIFT_BITS) * 0x00020002;
        out[0] = add_halves(pick_bytes(u[0], HALVES_1024, 0x4240), offset);
        out[1] = add_halves(pick_bytes(u[1], HALVES_1024, 0x4240), offset);
        out[2] = add_halves(pick_bytes(u[0], HALVES_1024, 0x4341), offset);
        out[3] = add_halves(pick_bytes(u[1], HALVES_1024, 0x4341), offset);
    }
    __device__ __forceinline__ void unpack(operand *o, float, int) const {
        const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
        for (int i = 0; i < 4; i++) {
            uint32_t pairs[4];
            row(words[i], scale_bits(i), pairs);
            for (int p = 0; p < 4; p++) o->a[p / 2][i / 2][p % 2 * 2 + i % 2] = pairs[p];
        }
    }
};
template <> struct tile<LLAMA_Q4> : tile_4_bits<false> {};
template <> struct tile<LLAMA_Q4E> : tile_4_bits<true> {};

template <> struct tile<LLAMA_Q8> {
    static constexpr bool SCALED = true;
    static constexpr int PARTS = 1, AHEAD = 3;
    uint4 codes[2]; // word i of codes[s]: row i, columns 16 s + 4t to + 3
    uint2 d;

    __device__ __forceinline__ void load(const uint8_t *strip, int number, int) {
        const seat at;
        const uint8_t *block = strip + (size_t)number * sizeof(block_q8);
        for (int s = 0; s < 2; s++)
            codes[s] = strip ? stream16(block + 32 + (4 * s + at.t) * 64 + at.quad * 16)
                             : make_uint4(0, 0, 0, 0);
        d = strip ? stream8(block + at.quad * 8) : make_uint2(0, 0);
    }
    __device__ __forceinline__ float scale(int row) const {
        return half_to_float((uint16_t)((row < 2 ? d.x : d.y) >> 16 * (row % 2)));
    }
    __device__ __forceinline__ void unpack(operand *o, float, int) const {
        for (int s = 0; s < 2; s++) {
            const uint32_t words[4] = {codes[s].x, codes[s].y, codes[s].z, codes[s].w};
            for (int i = 0; i < 4; i++) {
                const uint32_t u = words[i] ^ 0x80808080; // code + 128; less 1152 once in a half
                o->a[s][i / 2][i % 2] =
                    add_halves(pick_bytes(u, HALVES_1024, 0x4140), 0xe480e480);
                o->a[s][i / 2][2 + i % 2] =
                    add_halves(pick_bytes(u, HALVES_1024, 0x4342), 0xe480e480);
            }
        }
    }
};

/* f16, as it is; bf16, once scaled by a power of two that brings the matrix into f16's range. */
template <uint32_t KIND> struct tile {
    static constexpr bool SCALED = false;
    static constexpr int PARTS = 1, AHEAD = 2;
    uint2 columns[8]; // [4 s + j]: column 16 s + 4t + j; four rows each

    __device__ __forceinline__ void load(const uint8_t *strip, int number, int n_columns) {
        const seat at;
        for (int i = 0; i < 8; i++) {
            const int c = at.column(number, i);
            columns[i] = strip && c < n_columns
                             ? stream8(strip + (size_t)c * 2 * TILE_ROWS + at.quad * 8)
                             : make_uint2(0, 0);
        }
    }
    __device__ __forceinline__ uint32_t pair(uint32_t bits, float scale) const {
        if (KIND == LLAMA_F16) return bits;
        return pack_halves(__uint_as_float(bits << 16) * scale,
                           __uint_as_float(bits & 0xffff0000) * scale);
    }
    __device__ __forceinline__ float scale(int) const { return 1; }
    __device__ __forceinline__ void unpack(operand *o, float scale, int) const {
        for (int i = 0; i < 8; i++) { // step, product, pair of columns
            const int s = i / 4, m = i / 2 % 2, p = i % 2;
            const uint2 left = columns[4 * s + 2 * p], right = columns[4 * s + 2 * p + 1];
            const uint32_t l = m ? left.y : left.x, r = m ? right.y : right.x;
            o->a[s][m][2 * p] = pair(pick_bytes(l, r, 0x5410), scale);
            o->a[s][m][2 * p + 1] = pair(pick_bytes(l, r, 0x7632), scale);
        }
    }
};

/* f32: in two parts of halves, the second what the first lost; scaled like bf16. */
template <> struct tile<LLAMA_F32> {
    static constexpr bool SCALED = false;
    static constexpr int PARTS = 2, AHEAD = 1;
    uint4 columns[8];

    __device__ __forceinline__ void load(const uint8_t *strip, int number, int n_columns) {
        const seat at;
        for (int i = 0; i < 8; i++) {
            const int c = at.column(number, i);
            columns[i] = strip && c < n_columns
                             ? stream16(strip + (size_t)c * 4 * TILE_ROWS + at.quad * 16)
                             : make_uint4(0, 0, 0, 0);
        }
    }
    __device__ __forceinline__ float scale(int) const { return 1; }
    __device__ __forceinline__ static uint32_t row(uint4 v, int i) {
        return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
    }
    __device__ __forceinline__ void unpack(operand *o, float scale, int part) const {
        for (int i = 0; i < 16; i++) { // step, row, pair of columns
            const int s = i / 8, r = i / 2 % 4, p = i % 2;
            const float left = __uint_as_float(row(columns[4 * s + 2 * p], r)) * scale;
            const float right = __uint_as_float(row(columns[4 * s + 2 * p + 1], r)) * scale;
            uint32_t coarse, fine;
            split_halves(left, right, &coarse, &fine);
            o->a[s][r / 2][2 * p + r % 2] = part ? fine : coarse;
        }
    }
};

/* acc[m][n] += this tile times N products of 8 columns; other(n, b) gives b[s], the lane's part of
 * the n-th's step s. */
template <uint32_t KIND, int N, class OTHER>
__device__ __forceinline__ void multiply(const tile<KIND> &w, float matrix_scale, OTHER other,
                                         float acc[2][N][4]) {
    for (int part = 0; part < tile<KIND>::PARTS; part++) {
        operand o;
        w.unpack(&o, matrix_scale, part);
#pragma unroll
        for (int n = 0; n < N; n++) {
            uint32_t b[2][2];
            other(n, b);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                if (!tile<KIND>::SCALED) {
                    mma(acc[m][n], o.a[0][m], b[0]);
                    mma(acc[m][n], o.a[1][m], b[1]);
                    continue;
                }
                float sum[4] = {0, 0, 0, 0};
                mma(sum, o.a[0][m], b[0]);
                mma(sum, o.a[1][m], b[1]);
                for (int i = 0; i < 4; i++) acc[m][n][i] += w.scale(2 * m + i / 2) * sum[i];
            }
        }
    }
}
#endif
