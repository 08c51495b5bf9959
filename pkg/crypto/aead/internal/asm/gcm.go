package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// Offsets in the type gcm of crypto/aead, whose test holds it to them.
const (
	gcmPowers = 0   // H^16, H^15, ... H^1, 16 octets each
	gcmRound  = 256 // round keys, 15 of 16 octets
	gcmRounds = 496 // uint64
	gcmSalt   = 504 // 4 octets
	gcmTagLen = 508 // uint32
)

// Blocks of GHASH are held with their octets reversed, so that the carry-less
// product of two is the product in GF(2^128) of their reflections, one bit too
// low; the powers of H are kept one bit higher (times x) to make up for it.
//
// zmm layout, the same in all code below.
var (
	zAES   = []reg.VecPhysical{reg.Z0, reg.Z1, reg.Z2, reg.Z3} // counters, key stream, output
	zHash  = []reg.VecPhysical{reg.Z4, reg.Z5, reg.Z6, reg.Z7} // blocks for GHASH
	zAcc   = reg.Z8                                            // GHASH so far, in lane 0; other lanes 0
	zLo    = reg.Z9                                            // product, bits 0 to 127
	zMi    = reg.Z10                                           // bits 64 to 191
	zHi    = reg.Z11                                           // bits 128 to 255
	zTmp   = reg.Z12
	zSwap  = reg.Z13 // shuffle that reverses the octets of each lane
	zCtr   = reg.Z14 // counter blocks, reversed, of the next four blocks
	zBase  = reg.Z15 // counter block with counter 0, reversed
	zPoly  = reg.Z16 // x^128 + x^127 + x^126 + x^121 + 1, reflected
	zRound = []reg.VecPhysical{
		reg.Z17, reg.Z18, reg.Z19, reg.Z20, reg.Z21, reg.Z22, reg.Z23,
		reg.Z24, reg.Z25, reg.Z26, reg.Z27, reg.Z28, reg.Z29, reg.Z30,
	}
	zLast = reg.Z31 // last round key
)

// lanes makes a constant of four lanes that differ in their lowest 32 bits.
func lanes(name string, v ...uint32) Mem {
	m := GLOBL(name, 8|16) // RODATA|NOPTR
	for i, x := range v {
		DATA(i*16, U32(x))
		DATA(i*16+4, U32(0))
		DATA(i*16+8, U64(0))
	}
	return m
}

type gcmConsts struct {
	swap, poly        Mem
	first, one        Mem // counters
	add4, add8, add12 Mem
	add16             Mem
}

func newGCMConsts() *gcmConsts {
	c := &gcmConsts{}
	c.swap = GLOBL("gcmSwap", 8|16)
	DATA(0, U64(0x08090a0b0c0d0e0f))
	DATA(8, U64(0x0001020304050607))
	c.poly = GLOBL("gcmPoly", 8|16)
	DATA(0, U64(1))
	DATA(8, U64(0xc200000000000000))
	c.first = lanes("gcmFirst", 2, 3, 4, 5)
	c.one = lanes("gcmOne", 1, 1, 1, 1)
	c.add4 = lanes("gcmAdd4", 4, 4, 4, 4)
	c.add8 = lanes("gcmAdd8", 8, 8, 8, 8)
	c.add12 = lanes("gcmAdd12", 12, 12, 12, 12)
	c.add16 = lanes("gcmAdd16", 16, 16, 16, 16)
	return c
}

func gcmUnit() {
	c := newGCMConsts()
	c.crypt(true)
	c.crypt(false)
	c.mul()
}

// product multiplies z by the powers at h into lo, mi and hi, or adds there.
// It spoils z.
func product(first bool, h Mem, z, lo, mi, hi, tmp reg.VecPhysical) {
	if first {
		VPCLMULQDQ(Imm(0x00), h, z, lo)
		VPCLMULQDQ(Imm(0x11), h, z, hi)
		VPCLMULQDQ(Imm(0x01), h, z, mi)
		VPCLMULQDQ(Imm(0x10), h, z, tmp)
		VPXORQ(tmp, mi, mi)
		return
	}
	VPCLMULQDQ(Imm(0x00), h, z, tmp)
	VPXORQ(tmp, lo, lo)
	VPCLMULQDQ(Imm(0x11), h, z, tmp)
	VPXORQ(tmp, hi, hi)
	VPCLMULQDQ(Imm(0x01), h, z, tmp)
	VPCLMULQDQ(Imm(0x10), h, z, z)
	VPTERNLOGD(Imm(0x96), tmp, z, mi)
}

// reduce brings lo, mi, hi modulo the polynomial into hi, in each lane: the
// lowest 64 bits of what is left are added where the polynomial has its other
// terms, twice.
func reduce(lo, mi, hi, tmp, poly reg.VecPhysical) {
	VPCLMULQDQ(Imm(0x01), lo, poly, tmp)
	VPSHUFD(Imm(0x4e), lo, lo)
	VPTERNLOGD(Imm(0x96), tmp, lo, mi)
	VPCLMULQDQ(Imm(0x01), mi, poly, tmp)
	VPSHUFD(Imm(0x4e), mi, mi)
	VPTERNLOGD(Imm(0x96), tmp, mi, hi)
}

// fold adds the four lanes of hi into lane 0 of acc and clears the others.
func fold() {
	VEXTRACTI64X4(Imm(1), zHi, zTmp.AsY())
	VPXOR(zTmp.AsY(), zHi.AsY(), zHi.AsY())
	VEXTRACTI128(Imm(1), zHi.AsY(), zTmp.AsX())
	VPXOR(zTmp.AsX(), zHi.AsX(), zAcc.AsX())
}

// aes encrypts the first n registers of zAES. between are emitted one after each
// round: work that does not depend on them, for the units that wait.
func aes(name string, n int, rounds reg.Register, between ...func()) {
	each := func(f func(z reg.VecPhysical)) {
		for _, z := range zAES[:n] {
			f(z)
		}
	}
	round := func(i int) {
		each(func(z reg.VecPhysical) { VAESENC(zRound[i], z, z) })
	}
	each(func(z reg.VecPhysical) { VPXORQ(zRound[0], z, z) })
	for i := 1; i <= 9; i++ {
		round(i)
		if i <= len(between) {
			between[i-1]()
		}
	}
	roundTail(name, rounds, round, func() {
		each(func(z reg.VecPhysical) { VAESENCLAST(zLast, z, z) })
	})
}

// counters writes the counter blocks of the next n registers, reversed, to
// zAES. zCtr itself stays.
func (c *gcmConsts) counters(n int) {
	for j, add := range []Mem{c.add4, c.add8, c.add12}[:max(n-1, 0)] {
		VPADDD(add, zCtr, zAES[j+1])
	}
	VMOVDQA64(zCtr, zAES[0])
}

// crypt emits seal or open.
func (c *gcmConsts) crypt(seal bool) {
	const sig = "(k *byte, dst, src *byte, n int, iv, aad *byte, aadLen int)"
	if seal {
		TEXT("gcmSeal", NOSPLIT, "func"+sig)
		Doc("gcmSeal encrypts n octets of src to dst and appends the tag of k.tagLen octets.",
			"k is a *gcm; dst is src or disjoint; iv has 8 octets.")
	} else {
		TEXT("gcmOpen", NOSPLIT, "func"+sig+" uint64")
		Doc("gcmOpen decrypts n octets of src to dst and compares the tag of k.tagLen octets",
			"that follows in src: 0 if it is right, in a time that does not depend on it. dst",
			"is src or disjoint, and is written in any case; k is a *gcm; iv has 8 octets.")
	}
	Pragma("noescape")
	k, dst, src, left := param("k"), param("dst"), param("src"), param("n")
	iv, aad, aadLeft := param("iv"), param("aad"), param("aadLen")
	rounds := GP64()
	MOVQ(mem(k, gcmRounds), rounds)

	Comment("Constants and round keys")
	VBROADCASTI32X4(c.swap, zSwap)
	VBROADCASTI32X4(c.poly, zPoly)
	for i, z := range zRound {
		VBROADCASTI32X4(mem(k, gcmRound+16*i), z)
	}
	off := GP64()
	MOVQ(rounds, off)
	SHLQ(Imm(4), off)
	VBROADCASTI32X4(Mem{Base: k, Index: off, Scale: 1, Disp: gcmRound}, zLast)

	Comment("Counter block: salt, IV, counter; reversed")
	lo, hi := GP64(), GP64()
	MOVQ(mem(iv, 0), lo)
	BSWAPQ(lo)
	MOVL(mem(k, gcmSalt), hi.As32())
	BSWAPL(hi.As32())
	SHLQ(Imm(32), hi)
	high := GP64()
	MOVQ(lo, high)
	SHRQ(Imm(32), high)
	ORQ(high, hi)
	SHLQ(Imm(32), lo)
	VMOVQ(lo, zBase.AsX())
	VPINSRQ(Imm(1), hi, zBase.AsX(), zBase.AsX())
	VSHUFI64X2(Imm(0), zBase, zBase, zBase)
	VPADDD(c.first, zBase, zCtr)
	VPADDD(c.one, zBase, zBase)

	Comment("Lengths in bits, for the last block of GHASH")
	lenData, lenAAD := GP64(), GP64()
	MOVQ(left, lenData)
	SHLQ(Imm(3), lenData)
	MOVQ(aadLeft, lenAAD)
	SHLQ(Imm(3), lenAAD)

	Comment("Additional data, block by block")
	VPXOR(zAcc.AsX(), zAcc.AsX(), zAcc.AsX())
	ones, mask := GP64(), GP64()
	MOVQ(I32(-1), ones)
	TESTQ(aadLeft, aadLeft)
	JEQ(LabelRef("aadDone"))
	h1 := mem(k, gcmPowers+15*16)
	aadMul := func() {
		VPSHUFB(zSwap.AsX(), zHash[0].AsX(), zHash[0].AsX())
		VPXOR(zHash[0].AsX(), zAcc.AsX(), zHash[0].AsX())
		asX := func(z reg.VecPhysical) reg.VecPhysical { return z.AsX().(reg.VecPhysical) }
		product(true, h1, asX(zHash[0]), asX(zLo), asX(zMi), asX(zHi), asX(zTmp))
		reduce(asX(zLo), asX(zMi), asX(zHi), asX(zTmp), asX(zPoly))
		VMOVDQA(zHi.AsX(), zAcc.AsX())
	}
	Label("aadBlock")
	CMPQ(aadLeft, Imm(16))
	JBE(LabelRef("aadLast"))
	VMOVDQU(mem(aad, 0), zHash[0].AsX())
	aadMul()
	ADDQ(Imm(16), aad)
	SUBQ(Imm(16), aadLeft)
	JMP(LabelRef("aadBlock"))
	Label("aadLast")
	BZHIQ(aadLeft, ones, mask)
	KMOVQ(mask, reg.K1)
	VMOVDQU8_Z(mem(aad, 0), reg.K1, zHash[0].AsX())
	aadMul()
	Label("aadDone")

	Comment("16 blocks at a time; seal hashes those before the ones it encrypts")
	next := func() {
		ADDQ(U32(256), src)
		ADDQ(U32(256), dst)
		SUBQ(U32(256), left)
		CMPQ(left, U32(256))
	}
	hashNow := func() {
		for _, step := range hash(k) {
			step()
		}
	}
	CMPQ(left, U32(256))
	JB(LabelRef("tail"))
	if seal {
		c.batch(seal, "first", dst, src, rounds, nil)
		next()
		JB(LabelRef("hash"))
		Label("blocks")
		c.batch(seal, "blocks", dst, src, rounds, nil, hash(k)...)
		next()
		JAE(LabelRef("blocks"))
		Label("hash")
		hashNow()
	} else {
		Label("blocks")
		fetch(src, nil)
		c.batch(seal, "blocks", dst, src, rounds, nil, hash(k)...)
		next()
		JAE(LabelRef("blocks"))
	}

	Comment("241 to 255 octets: 16 blocks too, the last one cut, and no more")
	Label("tail")
	CMPQ(left, U32(240))
	JBE(LabelRef("under16"))
	MOVQ(left, mask)
	SUBQ(U32(192), mask)
	BZHIQ(mask, ones, mask)
	KMOVQ(mask, reg.K1)
	if seal {
		c.batch(seal, "cut", dst, src, rounds, reg.K1)
		hashNow()
	} else {
		fetch(src, reg.K1)
		c.batch(seal, "cut", dst, src, rounds, reg.K1, hash(k)...)
	}
	ADDQ(left, src)
	ADDQ(left, dst)
	XORQ(left, left)

	Comment("r = 0 to 15 blocks are left, and 4 variants do 0-3, 4-7, 8-11, 12-15. Lane r",
		"is free: its counter is the tag's, its block for GHASH the one of the lengths.",
		"Lanes above are zero, whatever the powers there: the table ends, and round keys follow.")
	Label("under16")
	r, powers, lane := GP64(), GP64(), reg.RCX
	LEAQ(mem(left, 15), r)
	SHRQ(Imm(4), r)
	MOVQ(r, powers)
	SHLQ(Imm(4), powers)
	NEGQ(powers)
	LEAQ(Mem{Base: k, Index: powers, Scale: 1, Disp: gcmPowers + 15*16}, powers)
	Comment("K5: the two quadwords of lane r mod 4")
	MOVQ(r, lane)
	ANDQ(Imm(3), lane)
	ADDQ(lane, lane)
	bits := GP64()
	MOVL(U32(3), bits.As32())
	SHLQ(reg.CL, bits)
	KMOVW(bits.As32(), reg.K5)
	MOVL(mem(k, gcmTagLen), mask.As32())
	BZHIQ(mask, ones, mask)
	Comment("K6: the octets of the tag")
	KMOVQ(mask, reg.K6)
	for nz := 1; nz < 4; nz++ {
		CMPQ(r, Imm(uint64(4*nz)))
		JB(LabelRef(fmt.Sprintf("tail%d", nz)))
	}
	for nz := 4; nz >= 1; nz-- {
		c.tail(seal, nz, dst, src, left, rounds, powers, ones, lenData, lenAAD)
	}

	Comment("Tag: GHASH in zHi, one lane per sum, plus the key stream of lane r in zAcc")
	Label("tag")
	reduce(zLo, zMi, zHi, zTmp, zPoly)
	VPSHUFB(zSwap, zHi, zHi)
	VPXORQ(zAcc, zHi, zHi)
	fold()
	if seal {
		VMOVDQU8(zAcc.AsX(), reg.K6, Mem{Base: dst, Index: left, Scale: 1})
		VZEROUPPER()
		RET()
		return
	}
	VMOVDQU8_Z(Mem{Base: src, Index: left, Scale: 1}, reg.K6, zHash[0].AsX())
	VPCMPUB(Imm(4), zHash[0].AsX(), zAcc.AsX(), reg.K6, reg.K1)
	diff := GP64()
	KMOVQ(reg.K1, diff)
	VZEROUPPER()
	Store(diff, ReturnIndex(0))
	RET()
}

// batch encrypts 16 counters, with between in the gaps, and crypts src to dst.
// Of the last register only the octets in cut exist, unless it is nil. Of seal,
// what GHASH takes is left in zHash; of open, fetch has put it there.
func (c *gcmConsts) batch(seal bool, name string, dst, src, rounds reg.GPVirtual, cut Op, between ...func()) {
	c.counters(4)
	for _, z := range zAES {
		VPSHUFB(zSwap, z, z)
	}
	VPADDD(c.add16, zCtr, zCtr)
	aes(name, 4, rounds, between...)
	for j, z := range zAES {
		in, out := mem(src, 64*j), mem(dst, 64*j)
		if cut == nil || j < 3 {
			VPXORQ(in, z, z)
			VMOVDQU64(z, out)
			if seal {
				VPSHUFB(zSwap, z, zHash[j])
			}
			continue
		}
		VMOVDQU8_Z(in, cut, zTmp)
		VPXORQ(zTmp, z, z)
		VMOVDQU8(z, cut, out)
		if seal {
			VMOVDQU8_Z(z, cut, zHash[j])
			VPSHUFB(zSwap, zHash[j], zHash[j])
		}
	}
}

// fetch reads 16 blocks of ciphertext for GHASH, for open.
func fetch(src reg.GPVirtual, cut Op) {
	for j, z := range zHash {
		if cut == nil || j < 3 {
			VMOVDQU64(mem(src, 64*j), z)
		} else {
			VMOVDQU8_Z(mem(src, 64*j), cut, z)
		}
		VPSHUFB(zSwap, z, z)
	}
}

// hash is GHASH of the 16 blocks in zHash, in steps.
func hash(k reg.GPVirtual) []func() {
	var steps []func()
	for j, z := range zHash {
		steps = append(steps, func() {
			if j == 0 {
				VPXORQ(zAcc, z, z)
			}
			product(j == 0, mem(k, gcmPowers+64*j), z, zLo, zMi, zHi, zTmp)
		})
	}
	return append(steps, func() { reduce(zLo, zMi, zHi, zTmp, zPoly) }, fold)
}

// tail emits the variant for 4(nz-1) to 4(nz-1)+3 blocks, the last of which may
// be cut: nz registers, lane r in the last of them.
func (c *gcmConsts) tail(seal bool, nz int, dst, src, left, rounds, powers, ones, lenData, lenAAD reg.GPVirtual) {
	name := fmt.Sprintf("tail%d", nz)
	Label(name)
	last := nz - 1
	c.counters(nz)
	VMOVDQA64(zBase, reg.K5, zAES[last])
	for _, z := range zAES[:nz] {
		VPSHUFB(zSwap, z, z)
	}
	Comment("K1 to K4: the octets of each register; there are at least 64*(nz-1)-15")
	n, zero, mask := GP64(), GP64(), GP64()
	k := []reg.OpmaskPhysical{reg.K1, reg.K2, reg.K3, reg.K4}
	for j := range nz {
		if j < nz-2 {
			KXNORQ(k[j], k[j], k[j])
			continue
		}
		MOVQ(left, n)
		if j > 0 {
			SUBQ(I32(64*j), n)
			if j == last {
				MOVL(U32(0), zero.As32())
				CMPQ(n, zero)
				CMOVQLT(zero, n)
			}
		}
		BZHIQ(n, ones, mask)
		KMOVQ(mask, k[j])
	}
	for j := range nz {
		VMOVDQU8_Z(mem(src, 64*j), k[j], zHash[j])
	}
	aes(name, nz, rounds)
	for j := range nz {
		VPXORQ(zHash[j], zAES[j], zAES[j])
		VMOVDQU8(zAES[j], k[j], mem(dst, 64*j))
		if seal {
			VMOVDQU8_Z(zAES[j], k[j], zHash[j])
		}
		VPSHUFB(zSwap, zHash[j], zHash[j])
	}
	VMOVQ(lenData, zTmp.AsX())
	VPINSRQ(Imm(1), lenAAD, zTmp.AsX(), zTmp.AsX())
	VSHUFI64X2(Imm(0), zTmp, zTmp, zTmp)
	VMOVDQA64(zTmp, reg.K5, zHash[last])
	VPXORQ(zAcc, zHash[0], zHash[0])
	for j := range nz {
		product(j == 0, mem(powers, 64*j), zHash[j], zLo, zMi, zHi, zTmp)
	}
	VMOVDQA64_Z(zAES[last], reg.K5, zAcc)
	if nz > 1 {
		JMP(LabelRef("tag"))
	}
}

// mul emits the product of two elements for the table of powers.
func (c *gcmConsts) mul() {
	TEXT("gcmMul", NOSPLIT, "func(dst, a, b *[16]byte)")
	Doc("gcmMul sets dst to the product of a and of b, which is held times x; both reversed.")
	Pragma("noescape")
	dst, a, b := param("dst"), param("a"), param("b")
	VMOVDQU(c.poly, reg.X5)
	VMOVDQU(mem(a, 0), reg.X0)
	product(true, mem(b, 0), reg.X0, reg.X1, reg.X2, reg.X3, reg.X4)
	reduce(reg.X1, reg.X2, reg.X3, reg.X4, reg.X5)
	VMOVDQU(reg.X3, mem(dst, 0))
	RET()
}
