//go:build !purego

#include "textflag.h"

// Sums of little-endian words of 32 bits. The lower and the upper words of each
// quadword are added apart, in Y1 and Y2, so that no carry is lost: Y0 masks
// the lower ones.

#define CLEAR \
	VPCMPEQD Y0, Y0, Y0 \
	VPSRLQ   $32, Y0, Y0 \
	VPXOR    Y1, Y1, Y1 \
	VPXOR    Y2, Y2, Y2

#define ADD(v, low) \
	VPAND  Y0, v, low \
	VPSRLQ $32, v, v  \
	VPADDQ low, Y1, Y1 \
	VPADDQ v, Y2, Y2

#define TOTAL \
	VPADDQ       Y2, Y1, Y1 \
	VEXTRACTI128 $1, Y1, X0 \
	VPADDQ       X0, X1, X0 \
	VPSRLDQ      $8, X0, X1 \
	VPADDQ       X1, X0, X0 \
	VMOVQ        X0, AX     \
	VZEROUPPER

// func addAVX2(src *byte, n int) uint64
TEXT ·addAVX2(SB), NOSPLIT, $0-24
	MOVQ src+0(FP), SI
	MOVQ n+8(FP), CX
	CLEAR

four:
	CMPQ    CX, $128
	JB      one
	VMOVDQU (SI), Y3
	VMOVDQU 32(SI), Y4
	VMOVDQU 64(SI), Y5
	VMOVDQU 96(SI), Y6
	ADD(Y3, Y7)
	ADD(Y4, Y8)
	ADD(Y5, Y9)
	ADD(Y6, Y10)
	ADDQ    $128, SI
	SUBQ    $128, CX
	JMP     four

one:
	CMPQ    CX, $32
	JB      end
	VMOVDQU (SI), Y3
	ADD(Y3, Y7)
	ADDQ    $32, SI
	SUBQ    $32, CX
	JMP     one

end:
	TOTAL
	MOVQ AX, ret+16(FP)
	RET

// func copyAddAVX2(dst, src *byte, n int) uint64
TEXT ·copyAddAVX2(SB), NOSPLIT, $0-32
	MOVQ dst+0(FP), DI
	MOVQ src+8(FP), SI
	MOVQ n+16(FP), CX
	CLEAR

four:
	CMPQ    CX, $128
	JB      one
	VMOVDQU (SI), Y3
	VMOVDQU 32(SI), Y4
	VMOVDQU 64(SI), Y5
	VMOVDQU 96(SI), Y6
	VMOVDQU Y3, (DI)
	VMOVDQU Y4, 32(DI)
	VMOVDQU Y5, 64(DI)
	VMOVDQU Y6, 96(DI)
	ADD(Y3, Y7)
	ADD(Y4, Y8)
	ADD(Y5, Y9)
	ADD(Y6, Y10)
	ADDQ    $128, SI
	ADDQ    $128, DI
	SUBQ    $128, CX
	JMP     four

one:
	CMPQ    CX, $32
	JB      end
	VMOVDQU (SI), Y3
	VMOVDQU Y3, (DI)
	ADD(Y3, Y7)
	ADDQ    $32, SI
	ADDQ    $32, DI
	SUBQ    $32, CX
	JMP     one

end:
	TOTAL
	MOVQ AX, ret+24(FP)
	RET
