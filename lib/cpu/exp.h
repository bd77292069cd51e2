/* exp.h: the numbers behind exp_f32, for the scalar form and every vector form alike.
 *
 * exp(x) = 2^k * exp(r),  k = round(x / ln 2),  r = x - k ln 2,  |r| <= ln 2 / 2. The polynomial
 * is the minimax one of relative error (3.1e-9; f32 itself has 6.0e-8), fitted with each
 * coefficient rounded to f32 before the next. Each form runs these steps, in this order:
 *
 *     x = min(max(x, EXP_LOW), EXP_HIGH)          NaN stays NaN
 *     t = fma(x, EXP_LOG2E, EXP_ROUND);  k = t - EXP_ROUND
 *     r = fma(k, -EXP_LN2_HIGH, x);      r = fma(k, -EXP_LN2_LOW, r)
 *     p = EXP_C6;  p = fma(p, r, EXP_C5) ... fma(p, r, EXP_C2);  p = fma(p, r, 1) twice
 *     p * 2^(k >> 1) * 2^(k - (k >> 1)) */
#ifndef EXP_H
#define EXP_H

#define EXP_LOW (-104.0f) // below, the result rounds to zero
#define EXP_HIGH 89.0f    // above, to infinity
#define EXP_ROUND 0x1.8p23f // adding it leaves an integer, half to even
#define EXP_LOG2E 0x1.715476p+0f
#define EXP_LN2_HIGH 0x1.62e4p-1f
#define EXP_LN2_LOW 0x1.7f7d1cp-20f
#define EXP_C2 0x1.fffffcp-2f
#define EXP_C3 0x1.555492p-3f
#define EXP_C4 0x1.5558bp-5f
#define EXP_C5 0x1.123986p-7f
#define EXP_C6 0x1.6a4cb4p-10f

#endif
