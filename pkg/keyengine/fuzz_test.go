package keyengine

import (
	"bytes"
	"syscall"
	"testing"
)

// FuzzSocket: whatever datagram comes to the socket, the server goes on and
// answers the next request, of the same connection and of another, and nothing of
// one refused request is left. Datagrams of several messages are among them.
func FuzzSocket(f *testing.F) {
	pair := cat(caddr(xSrc, 0, 32, sin(0, gwB...)), caddr(xDst, 0, 32, sin(0, gwA...)))
	sel := cat(caddr(xSrc, 255, 16, sin(0, netA...)), caddr(xDst, 255, 16, sin(0, netB...)))
	message := func(typ, satype byte, exts ...[]byte) []byte {
		body := cat(exts...)
		return cat([]byte{2, typ, 0, satype}, u16(uint16(2+len(body)/8)), u16(0), u32(9), u32(8), body)
	}
	keys := cat(ckey(xEncrKey, key16), ckey(xAuthKey, key20), clife(xHard, 0, 0, 3600, 0), clife(xSoft, 0, 0, 3000, 0))
	pol := cpolicy(2, 2, 0, 0, crequest(50, 2, 3, 7, sin(0, gwA...), sin(0, gwB...)))
	getspi := message(cGetSPI, 3, csa2(2, 0), pair, cext(xRange, cat(u32(0x2000), u32(0x2000), u32(0))...))
	add := message(cAdd, 3, csa(0x1000, 4, 1, 3, 12, 0), csa2(2, 7), pair, keys)
	update := message(cUpdate, 3, csa(0x2000, 4, 1, 3, 12, 0), csa2(2, 7), pair, keys, cext(xNATT, 2, 0, 0, 0), cport(xSport, 4500), cport(xDport, 4500))
	for _, b := range [][]byte{
		getspi, add, update, cat(getspi, update, add, add), message(cDelete, 3, csa(0x1000, 0, 0, 0, 0, 0), pair),
		message(cGet, 3, csa(0x1000, 0, 0, 0, 0, 0), pair), message(cRegister, 3), message(cRegister, 2, cext(0x8001, 3, 0, 0, 0)),
		message(cFlush, 0), message(cDump, 0), message(cPromisc, 1), message(cSPDAdd, 0, pol, sel), message(cSPDUpdate, 0, sel, pol),
		message(cSPDDump, 0), message(cSPDGet, 0, cpolicy(0, 0, 9, 0)), message(224, 0), cat(message(224, 0), message(cSPDAdd, 0, pol, sel), message(225, 0)),
		message(227, 0), message(24, 0, cpolicy(2, 2, 0, 0, crequest(50, 2, 3, 7, sin(0, gwA...), sin(0, gwB...)), crequest(50, 2, 3, 7, sin(0, netA...), sin(0, netB...))), sel),
	} {
		f.Add(b)
	}
	_, _, path, _ := engineAt(f)
	other := open(f, path, 2)
	other.report(cRegister, 0, 1, 0, cext(0x8001, 3, 0, 0, 0)) // opted in, packs
	drain := func(t testing.TB, p *program, seq uint32) {
		t.Helper()
		want := message(cGet, 3)
		copy(want[8:], cat(u32(seq), u32(p.pid)))
		if _, err := again(func() (int, error) { return syscall.Write(p.fd, want) }); err != nil {
			t.Fatal(err)
		}
		want[2] = byte(syscall.EINVAL)
		b := make([]byte, 1<<16)
		for {
			n, err := again(func() (int, error) { return syscall.Read(p.fd, b) })
			if err != nil || n == 0 {
				t.Fatalf("no answer: %d octets, %v", n, err)
			}
			if bytes.Contains(b[:n], want) {
				return
			}
		}
	}
	drain(f, other, 1)
	seq := uint32(0x10000000)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<16 {
			return
		}
		p := open(t, path, 1)
		p.report(cRegister, 0, 1, 0, cext(0x8001, 3, 0, 0, 0))
		if _, err := again(func() (int, error) { return syscall.Write(p.fd, b) }); err != nil {
			t.Fatal(err)
		}
		seq++
		drain(t, p, seq)
		for _, typ := range []byte{226, cFlush, cSPDFlush} { // X_ABORT
			p.report(typ, 0, seq, 0)
		}
		drain(t, p, seq+1<<20)
		drain(t, other, seq)
	})
}
