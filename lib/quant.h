/* quant.h: how weights are laid out in blocks, and the plain way in and out of each kind.
 *
 * A matrix is cut into strips of TILE_ROWS rows, a strip into blocks of a kind's `columns`
 * columns, left to right. Inside a block the rows are interleaved so that one vector load feeds
 * all of a strip's rows at once and no sum runs across a register. Rows beyond the last and
 * columns beyond the last are stored as zeros. The file holds strips in this order and every
 * kernel, on every machine, reads the same bytes. */
#ifndef QUANT_H
#define QUANT_H
#include <stddef.h>
#include <stdint.h>

enum { TILE_ROWS = 16, GROUP = 32 };
enum { PAGE_POSITIONS = 32 }; // positions in one KV page (cache.h), whole tiles of 16

/* f32, f16, bf16: a block is one column: TILE_ROWS values, row 0 first.
 *
 * q8: GROUP columns. value(row r, column c) = f16(d[r]) * q[c / 4][r][c % 4] */
struct block_q8 {
    uint16_t d[TILE_ROWS];              // f16 bits
    int8_t q[GROUP / 4][TILE_ROWS][4];  // -127..127 from our encoder; a -128 met means -128
};
/* q4: GROUP columns; a byte holds column c < 16 in its low half and column c + 16 in its high
 * half. value(r, c) = scale[r] * (levels[code] + shift[r]), code = half of q[c % 16 / 4][r][c % 4]
 *
 *   d[r]:  f16, its fraction cut to 4 bits: Q4_SCALE scale | 6 bits: shift / 2 + 32
 *
 * Weights crowd around their middle, so q4's levels do too; the scale's sign turns them over, as
 * they reach further down than up, and the shift takes them to where a group's middle is.
 *
 * q4e: the same blocks with even levels. Weights that were 4-bit once, in a kind of llama.cpp's,
 * stand on even steps of groups of 32, and are met there. */
struct block_q4 {
    uint16_t d[TILE_ROWS];
    uint8_t q[GROUP / 8][TILE_ROWS][4];
};
/* A 4-bit kind's levels, and half way between them. */
struct levels {
    int8_t at[16];
    float middles[15];
};
#define Q4_SCALE 64.f
#define Q4_MOST_SCALE (0x1.fp15f / Q4_SCALE)
enum { Q4_SCALE_BITS = 0xffc0, Q4_SHIFT_BITS = 0x3f, Q4_LEAST_SHIFT = -64, Q4_MOST_SHIFT = 62 };
static inline int q4_shift(uint16_t d) { return 2 * (d & Q4_SHIFT_BITS) + Q4_LEAST_SHIFT; }

/* Rotated kinds, q8r and q4r: the same blocks, of weights whose groups were turned by a Hadamard
 * matrix H, which is orthogonal but for its size: w' = H w / 8 meets x' = H x / 4, and
 * w' x' = w x. Each element of x' holds something of all 32, so a single large one no longer
 * makes the codes of the others coarse (arXiv:2404.00456; here inside a group). */
#define ROTATED_WEIGHT 0.125f
#define ROTATED_INPUT 0.25f

struct kind {
    const char *name;      // "q8"
    uint32_t columns;      // columns that one block covers
    uint32_t block_bytes;
    float limit;           // largest |weight| the kind can hold
    void (*decode_row)(const void *block, uint32_t row, float *values); // values (columns)
    void (*encode)(const float *values, void *block); // values (TILE_ROWS, columns), finite
    int rotated;           // the two above take and give rotated weights
    const struct levels *levels; // of 4-bit kinds
};

/* Turns x (n) by a Hadamard matrix, in blocks of b, the largest power of two that divides n: for
 * h = 1, 2, 4 ... b / 2 a pair (x[j], x[j + h]) becomes its sum and its difference. The matrix is
 * its own inverse but for 1 / b. */
void hadamard(float *x, size_t n);
/* Turns GROUP numbers so and multiplies them by SIZE. */
void rotate_group(float *x, float size);

/* Packs one block: values (GROUP, TILE_ROWS), column by column, scale (TILE_ROWS) as fit.h finds it
 * with f16's precision. Each weight gets the nearest code. */
void q8_pack(const float *values, const float *scale, struct block_q8 *block);
/* The code of the level nearest to value / scale - shift, or the level. */
static inline int q4_code(const struct levels *levels, float value, float scale, float shift) {
    const float y = scale == 0 ? 0 : value / scale - shift;
    int code = 0;
    for (int i = 0; i < 15; i++) code += y > levels->middles[i];
    return code;
}
/* Packs one q4 block: values (GROUP, TILE_ROWS), column by column; scale and shift (TILE_ROWS)
 * as fit.h finds them. Each weight gets the nearest level. */
void q4_pack(const struct levels *levels, const float *values, const float *scale,
             const float *shift, struct block_q4 *block);

/* NULL for a number that is no kind. */
const struct kind *kind_find(uint32_t kind);
/* Bytes of one strip of a matrix, and of all. Nothing overflows for ROWS and COLUMNS up to 2^32
 * whose product is at most 2^60. */
uint64_t kind_strip_bytes(const struct kind *kind, uint64_t columns);
uint64_t kind_matrix_bytes(const struct kind *kind, uint64_t rows, uint64_t columns);
/* One block: values (TILE_ROWS, columns), plain weights of rotated kinds too. */
void kind_encode(const struct kind *kind, const float *values, void *block);
void kind_decode(const struct kind *kind, const void *block, float *values);
/* Row ROW of a matrix whose data starts at DATA: out (columns). */
void kind_decode_row(const struct kind *kind, const void *data, uint64_t columns, uint64_t row,
                     float *out);

/* IEEE 754 conversions, round to nearest even, subnormals and NaN kept. */
float f16_to_f32(uint16_t bits);
uint16_t f32_to_f16(float value);
float bf16_to_f32(uint16_t bits);
uint16_t f32_to_bf16(float value);
#endif
