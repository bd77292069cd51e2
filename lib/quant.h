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
 * half. value(r, c) = f16(d[r]) * (code - 8),  code = half of q[c % 16 / 4][r][c % 4] */
struct block_q4 {
    uint16_t d[TILE_ROWS];
    uint8_t q[GROUP / 8][TILE_ROWS][4];
};

struct kind {
    const char *name;      // "q8"
    uint32_t columns;      // columns that one block covers
    uint32_t block_bytes;
    float limit;           // largest |weight| the kind can hold
    void (*decode_row)(const void *block, uint32_t row, float *values); // values (columns)
    void (*encode)(const float *values, void *block); // values (TILE_ROWS, columns), finite
};

/* NULL for a number that is no kind. */
const struct kind *kind_find(uint32_t kind);
/* Bytes of one strip of a matrix, and of all. Nothing overflows for ROWS and COLUMNS up to 2^32
 * whose product is at most 2^60. */
uint64_t kind_strip_bytes(const struct kind *kind, uint64_t columns);
uint64_t kind_matrix_bytes(const struct kind *kind, uint64_t rows, uint64_t columns);
/* One block: values (TILE_ROWS, columns). */
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
