package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// Offsets in cbcLane of crypto/aead, whose test holds it to them.
const (
	laneSrc  = 0
	laneDst  = 8
	laneIV   = 16
	laneSize = 24
)

var xs = []reg.VecPhysical{
	reg.X0, reg.X1, reg.X2, reg.X3, reg.X4, reg.X5, reg.X6, reg.X7,
	reg.X8, reg.X9, reg.X10, reg.X11, reg.X12, reg.X13, reg.X14, reg.X15,
}

func cbcUnit() {
	subWord()
	invMix()
	cbcEncrypt()
	cbcDecrypt()
}

// subWord emits the step of the key schedule that needs the S-box: a table in
// memory would tell the key to who watches the cache.
func subWord() {
	TEXT("aesSubWord", NOSPLIT, "func(w uint32) uint32")
	Doc("aesSubWord is SubWord of FIPS 197, 5.2.")
	w := GP32()
	Load(Param("w"), w)
	MOVD(w, reg.X0)
	PSHUFD(Imm(0), reg.X0, reg.X0)
	AESKEYGENASSIST(Imm(0), reg.X0, reg.X0)
	MOVD(reg.X0, w)
	Store(w, ReturnIndex(0))
	RET()
}

func invMix() {
	TEXT("aesInvMix", NOSPLIT, "func(dst, src *[16]byte)")
	Doc("aesInvMix makes a round key of the equivalent inverse cipher (FIPS 197, 5.3.5).")
	Pragma("noescape")
	dst, src := param("dst"), param("src")
	MOVOU(mem(src, 0), reg.X0)
	AESIMC(reg.X0, reg.X0)
	MOVOU(reg.X0, mem(dst, 0))
	RET()
}

// aesX runs one of the two ciphers over x with round keys from memory, through
// the register key.
func aesX(name string, rk, last, rounds reg.Register, x []reg.VecPhysical, key reg.VecPhysical, one, end func(k, x Op)) {
	round := func(i int, f func(k, x Op)) {
		MOVOU(mem(rk, 16*i), key)
		for _, r := range x {
			f(key, r)
		}
	}
	round(0, func(k, x Op) { PXOR(k, x) })
	for i := 1; i <= 9; i++ {
		round(i, one)
	}
	roundTail(name, rounds, func(i int) { round(i, one) }, func() {
		MOVOU(mem(last, 0), key)
		for _, r := range x {
			end(key, r)
		}
	})
}

// cbcEncrypt emits eight chains side by side. One chain waits for each round's
// result; eight fill the unit's pipeline, in the time of one.
func cbcEncrypt() {
	TEXT("cbcEncrypt8", NOSPLIT, "func(rk *byte, rounds int, lanes *byte, blocks int)")
	Doc("cbcEncrypt8 encrypts blocks blocks, at least one, of each lane of a",
		"*[8]cbcLane. Lanes may be equal.")
	Pragma("noescape")
	rk, rounds, l, left := param("rk"), param("rounds"), param("lanes"), param("blocks")
	last, off := GP64(), GP64()
	MOVQ(rounds, last)
	SHLQ(Imm(4), last)
	ADDQ(rk, last)
	p := GP64()
	for i, x := range xs[:8] {
		MOVQ(mem(l, laneSize*i+laneIV), p)
		MOVOU(mem(p, 0), x)
	}
	XORQ(off, off)
	Label("next")
	for i, x := range xs[:8] {
		p := GP64()
		MOVQ(mem(l, laneSize*i+laneSrc), p)
		MOVOU(Mem{Base: p, Index: off, Scale: 1}, xs[8+i%4])
		PXOR(xs[8+i%4], x)
	}
	aesX("next", rk, last, rounds, xs[:8], xs[12], func(k, x Op) { AESENC(k, x) }, func(k, x Op) { AESENCLAST(k, x) })
	for i, x := range xs[:8] {
		p := GP64()
		MOVQ(mem(l, laneSize*i+laneDst), p)
		MOVOU(x, Mem{Base: p, Index: off, Scale: 1})
	}
	ADDQ(Imm(16), off)
	DECQ(left)
	JNE(LabelRef("next"))
	RET()
}

// cbcDecrypt emits eight blocks of one chain side by side, then 4, 2, 1.
func cbcDecrypt() {
	TEXT("cbcDecrypt", NOSPLIT, "func(rk *byte, rounds int, dst, src, iv *byte, blocks int)")
	Doc("cbcDecrypt decrypts blocks blocks of src to dst, which is src or disjoint. rk are",
		"the keys of the equivalent inverse cipher.")
	Pragma("noescape")
	rk, rounds, dst, src, iv, left := param("rk"), param("rounds"), param("dst"), param("src"), param("iv"), param("blocks")
	last := GP64()
	MOVQ(rounds, last)
	SHLQ(Imm(4), last)
	ADDQ(rk, last)
	prev, key := xs[8], xs[9]
	MOVOU(mem(iv, 0), prev)
	for n := 8; n >= 1; n /= 2 {
		name := fmt.Sprintf("by%d", n)
		Label(name)
		CMPQ(left, Imm(uint64(n)))
		JB(LabelRef(fmt.Sprintf("below%d", n)))
		for i, x := range xs[:n] {
			MOVOU(mem(src, 16*i), x)
		}
		aesX(name, rk, last, rounds, xs[:n], key, func(k, x Op) { AESDEC(k, x) }, func(k, x Op) { AESDECLAST(k, x) })
		PXOR(prev, xs[0])
		for i := 1; i < n; i++ {
			MOVOU(mem(src, 16*(i-1)), xs[10+i%4])
			PXOR(xs[10+i%4], xs[i])
		}
		Comment("All of src is read before dst, which may be the same, is written.")
		MOVOU(mem(src, 16*(n-1)), prev)
		for i, x := range xs[:n] {
			MOVOU(x, mem(dst, 16*i))
		}
		ADDQ(Imm(uint64(16*n)), src)
		ADDQ(Imm(uint64(16*n)), dst)
		SUBQ(Imm(uint64(n)), left)
		JMP(LabelRef(name))
		Label(fmt.Sprintf("below%d", n))
	}
	RET()
}
