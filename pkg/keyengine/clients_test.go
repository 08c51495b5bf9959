package keyengine

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// What programs of others send, octet by octet and in their order of extensions,
// and what each of them needs of the answers. Nothing here is made or read with
// proto/pfkey, lest a mistake be made twice.

const (
	cGetSPI, cUpdate, cAdd, cDelete, cGet, cAcquire, cRegister, cExpire, cFlush, cDump = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10

	cPromisc, cSPDUpdate, cSPDAdd, cSPDDelete, cSPDGet, cSPDDump, cSPDFlush, cSPDDelete2 = 11, 13, 14, 15, 16, 18, 19, 22

	xSA, xCurrent, xHard, xSoft, xSrc, xDst, xAuthKey, xEncrKey = 1, 2, 3, 4, 5, 6, 8, 9

	xProposal, xAuths, xEncrs, xRange, xPolicy, xSA2, xNATT, xSport, xDport = 13, 14, 15, 16, 18, 19, 20, 21, 22
)

var ne = binary.NativeEndian

func cat(parts ...[]byte) []byte { return slices.Concat(parts...) }

// cext makes an extension of its number and octets, padded.
func cext(typ uint16, body ...byte) []byte {
	b := append([]byte{0, 0, 0, 0}, body...)
	for len(b)%8 != 0 {
		b = append(b, 0)
	}
	ne.PutUint16(b, uint16(len(b)/8))
	ne.PutUint16(b[2:], typ)
	return b
}

func u16(v uint16) []byte { return ne.AppendUint16(nil, v) }
func u32(v uint32) []byte { return ne.AppendUint32(nil, v) }
func u64(v uint64) []byte { return ne.AppendUint64(nil, v) }

// sin is Linux's sockaddr_in; port as it lies there.
func sin(port uint16, a ...byte) []byte {
	return cat(u16(2), []byte{byte(port >> 8), byte(port)}, a, make([]byte, 8))
}

func caddr(typ uint16, proto, prefix byte, sockaddr []byte) []byte {
	return cext(typ, cat([]byte{proto, prefix, 0, 0}, sockaddr)...)
}

func csa(spi uint32, replay, state, auth, encr byte, flags uint32) []byte {
	return cext(xSA, cat(binary.BigEndian.AppendUint32(nil, spi), []byte{replay, state, auth, encr}, u32(flags))...)
}

func csa2(mode byte, reqid uint32) []byte {
	return cext(xSA2, cat([]byte{mode, 0, 0, 0}, u32(0), u32(reqid))...)
}

func clife(typ uint16, alloc uint32, octets, add, use uint64) []byte {
	return cext(typ, cat(u32(alloc), u64(octets), u64(add), u64(use))...)
}

func ckey(typ uint16, key []byte) []byte {
	return cext(typ, cat(u16(uint16(8*len(key))), u16(0), key)...)
}

func cport(typ, port uint16) []byte { return cext(typ, byte(port>>8), byte(port), 0, 0) }

// cpolicy is sadb_x_policy, as libipsec makes it of a policy in text.
func cpolicy(typ uint16, dir byte, id, prio uint32, requests ...[]byte) []byte {
	return cext(xPolicy, cat(u16(typ), []byte{dir, 0}, u32(id), u32(prio), cat(requests...))...)
}

// crequest is sadb_x_ipsecrequest, whose length is in octets.
func crequest(proto uint16, mode, level byte, reqid uint32, addrs ...[]byte) []byte {
	a := cat(addrs...)
	return cat(u16(uint16(16+len(a))), u16(proto), []byte{mode, level, 0, 0}, u32(reqid), u32(0), a)
}

// cmsg is what a program got.
type cmsg struct {
	typ, errno, satype byte
	seq, pid           uint32
	ext                map[uint16][]byte // with their headers
	raw                []byte
}

// program is a process that speaks PF_KEY.
type program struct {
	t   testing.TB
	fd  int
	pid uint32
}

func (p *program) send(typ, satype byte, seq uint32, exts ...[]byte) {
	p.t.Helper()
	p.report(typ, satype, seq, 0, exts...)
}

func (p *program) report(typ, satype byte, seq uint32, errno byte, exts ...[]byte) {
	p.t.Helper()
	body := cat(exts...)
	b := cat([]byte{2, typ, errno, satype}, u16(uint16(2+len(body)/8)), u16(0), u32(seq), u32(p.pid), body)
	if _, err := again(func() (int, error) { return syscall.Write(p.fd, b) }); err != nil {
		p.t.Fatal(err)
	}
}

// again repeats a system call that a signal of the runtime has interrupted.
func again(f func() (int, error)) (n int, err error) {
	for n, err = f(); err == syscall.EINTR; n, err = f() {
	}
	return n, err
}

// recv reads as libipsec does (peek at the header, then the whole) and is as
// strict: whatever it does not know or finds twice makes it drop the message.
func (p *program) recv() *cmsg {
	p.t.Helper()
	var head [16]byte
	n, err := again(func() (int, error) {
		n, _, err := syscall.Recvfrom(p.fd, head[:], syscall.MSG_PEEK)
		return n, err
	})
	if err != nil || n != 16 {
		p.t.Fatalf("peek: %d octets, %v", n, err)
	}
	b := make([]byte, 1<<16)
	n, err = again(func() (int, error) { return syscall.Read(p.fd, b) })
	if err != nil || n != 8*int(ne.Uint16(head[4:])) {
		p.t.Fatalf("a message of %d octets whose header says %d words, %v", n, ne.Uint16(head[4:]), err)
	}
	b = b[:n]
	if n > 4096 {
		p.t.Errorf("a message of %d octets; buffers have 4096", n)
	}
	m := &cmsg{typ: b[1], errno: b[2], satype: b[3], seq: ne.Uint32(b[8:]), pid: ne.Uint32(b[12:]), ext: map[uint16][]byte{}, raw: b}
	if b[0] != 2 || ne.Uint16(b[6:]) != 0 {
		p.t.Errorf("header %x", b[:16])
	}
	if m.errno != 0 && n != 16 {
		p.t.Errorf("an error of %d octets", n)
	}
	for e := b[16:]; len(e) > 0; {
		size, typ := 8*int(ne.Uint16(e)), ne.Uint16(e[2:])
		if size == 0 || size > len(e) || typ == 0 || typ > 23 || typ == 17 || m.ext[typ] != nil {
			p.t.Fatalf("libipsec drops a message with extension %d of %d octets: %x", typ, size, b)
		}
		m.ext[typ] = e[:size]
		e = e[size:]
	}
	if src, dst := m.ext[xSrc], m.ext[xDst]; src != nil && dst != nil && (src[4] != dst[4] || src[8] != dst[8]) {
		p.t.Fatalf("libipsec drops a message whose addresses have two protocols or families: %x", b)
	}
	return m
}

// answer reads until the answer to (typ, seq), as libipsec and strongSwan do by
// type, pid and seq; what others did meanwhile is passed over.
func (p *program) answer(typ byte, seq uint32, errno syscall.Errno) *cmsg {
	p.t.Helper()
	for {
		m := p.recv()
		if m.pid != p.pid || m.typ != typ || m.seq < seq {
			continue
		}
		if m.seq != seq {
			p.t.Fatalf("answer %d to message %d, want %d", m.typ, m.seq, seq)
		}
		if m.errno != byte(errno) {
			p.t.Fatalf("answer to message type %d: %v, want %v", typ, syscall.Errno(m.errno), errno)
		}
		return m
	}
}

func (p *program) ask(typ, satype byte, seq uint32, exts ...[]byte) *cmsg {
	p.t.Helper()
	p.send(typ, satype, seq, exts...)
	return p.answer(typ, seq, 0)
}

// dump reads answers until the one of seq 0.
func (p *program) dump(typ, satype byte, exts ...[]byte) (l []*cmsg) {
	p.t.Helper()
	p.send(typ, satype, 0, exts...)
	for {
		m := p.recv()
		if m.pid != p.pid || m.typ != typ {
			continue
		}
		if m.errno != 0 {
			if syscall.Errno(m.errno) != syscall.ENOENT {
				p.t.Fatalf("dump: %v", syscall.Errno(m.errno))
			}
			return nil
		}
		if l = append(l, m); m.seq == 0 {
			return l
		}
	}
}

// event reads until an event of the engine.
func (p *program) event(typ byte) *cmsg {
	p.t.Helper()
	for {
		if m := p.recv(); m.typ == typ {
			if m.pid != 0 {
				p.t.Errorf("an event with pid %d, which clients drop", m.pid)
			}
			return m
		}
	}
}

// same checks an extension octet by octet.
func (m *cmsg) same(t *testing.T, want ...[]byte) {
	t.Helper()
	for _, w := range want {
		if typ := ne.Uint16(w[2:]); !bytes.Equal(m.ext[typ], w) {
			t.Errorf("message type %d, extension %d:\n got %x\nwant %x", m.typ, typ, m.ext[typ], w)
		}
	}
}

func (m *cmsg) has(t *testing.T, exts ...uint16) {
	t.Helper()
	for _, x := range exts {
		if m.ext[x] == nil {
			t.Errorf("message type %d without extension %d: %x", m.typ, x, m.raw)
		}
	}
}

func (m *cmsg) spi() uint32 { return binary.BigEndian.Uint32(m.ext[xSA][4:]) }

// engineAt is serve with a report of SAs that may send, for who looks.
func engineAt(t testing.TB) (e *Engine, s *keysock.Server, path string, installed chan sad.OutKey) {
	t.Helper()
	installed = make(chan sad.OutKey, 100)
	e, s, path = serve(t, Options{Installed: func(k sad.OutKey) {
		select {
		case installed <- k:
		default: // nobody looks
		}
	}})
	return e, s, path, installed
}

// open starts a program.
func open(t testing.TB, path string, pid uint32) *program {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_SEQPACKET|syscall.SOCK_CLOEXEC, 0)
	if err == nil {
		t.Cleanup(func() { syscall.Close(fd) })
		tv := syscall.NsecToTimeval(int64(10 * time.Second))
		err = errors.Join(syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &tv),
			syscall.Connect(fd, &syscall.SockaddrUnix{Name: path}))
	}
	if err != nil {
		t.Fatal(err)
	}
	return &program{t, fd, pid}
}

var (
	gwA, gwB = []byte{192, 0, 2, 1}, []byte{198, 51, 100, 2}
	netA     = []byte{10, 1, 0, 0}
	netB     = []byte{10, 2, 0, 0}
	key16    = bytes.Repeat([]byte{0xa0}, 16)
	key20    = bytes.Repeat([]byte{0xb0}, 20)
)

// setkey (ipsec-tools): REGISTER of type 0 first, seq 0 in everything, keys and
// lifetimes in front of the SA, the SA larval and with KAME's flag 0x40, addresses
// of protocol 255; the policy of spdadd's text in front of its addresses, and a
// forward policy beside each inbound one.
func TestClientSetkey(t *testing.T) {
	_, _, path, _ := engineAt(t)
	p := open(t, path, 4711)
	p.ask(cRegister, 0, 0).has(t, xAuths, xEncrs)

	// add 192.0.2.1 198.51.100.2 esp 0x1000 -m tunnel -u 7 -r 4 -lh 3600 -ls 3000 -E aes-cbc ... -A hmac-sha1 ... ;
	src, dst := caddr(xSrc, 255, 32, sin(0, gwA...)), caddr(xDst, 255, 32, sin(0, gwB...))
	add := [][]byte{
		ckey(xEncrKey, key16), ckey(xAuthKey, key20), clife(xHard, 0, 0, 3600, 0), clife(xSoft, 0, 0, 3000, 0),
		csa(0x1000, 4, 0, 3, 12, 0x40), csa2(2, 7), src, dst,
	}
	plainSrc, plainDst := caddr(xSrc, 0, 32, sin(0, gwA...)), caddr(xDst, 0, 32, sin(0, gwB...))
	a := p.ask(cAdd, 3, 0, add...)
	a.same(t, csa(0x1000, 4, 1, 3, 12, 0), csa2(2, 7), plainSrc, plainDst, add[2], add[3])
	p.send(cAdd, 3, 0, add...)
	p.answer(cAdd, 0, syscall.EEXIST)
	// get 192.0.2.1 198.51.100.2 esp 0x1000;
	g := p.ask(cGet, 3, 0, csa(0x1000, 0, 0, 0, 0, 0), csa2(2, 7), src, dst)
	g.same(t, csa(0x1000, 4, 1, 3, 12, 0), csa2(2, 7), plainSrc, plainDst, add[0], add[1], add[2], add[3])
	g.has(t, xCurrent)
	// add ... ah 0x1001 -A hmac-sha1 ...; and one of IPComp, which have no lifetimes.
	p.ask(cAdd, 2, 0, ckey(xAuthKey, key20), csa(0x1001, 0, 0, 3, 0, 0x40), csa2(0, 0), src, dst).same(t, csa(0x1001, 0, 1, 3, 0, 0), csa2(1, 0))
	p.ask(cAdd, 9, 0, csa(0x1002, 0, 0, 0, 2, 0x40), csa2(0, 0), src, dst).same(t, csa(0x1002, 0, 1, 0, 2, 0))
	// getspi 198.51.100.2 192.0.2.1 esp 0x2000: with an SA extension, min = max.
	q := p.ask(cGetSPI, 3, 0, csa(0x2000, 0, 0, 0, 0, 0), csa2(0, 0), caddr(xSrc, 255, 32, sin(0, gwB...)), caddr(xDst, 255, 32, sin(0, gwA...)),
		cext(xRange, cat(u32(0x2000), u32(0x2000), u32(0))...))
	if q.spi() != 0x2000 {
		t.Errorf("getspi 0x2000: got %#x", q.spi())
	}
	// -D prints what GET has, of all types and larval ones too.
	l := p.dump(cDump, 0)
	if len(l) != 4 {
		t.Fatalf("-D: %d SAs, want 4", len(l))
	}
	for _, m := range l {
		m.has(t, xSA, xSA2, xCurrent, xHard, xSoft, xSrc, xDst)
	}

	// spdadd 10.1.0.0/16 10.2.0.0/16 any -P out prio low ipsec esp/tunnel/192.0.2.1-198.51.100.2/unique:7;
	out := cpolicy(2, 2, 0, 0xc0000000, crequest(50, 2, 3, 7, sin(0, gwA...), sin(0, gwB...)))
	psrc, pdst := caddr(xSrc, 255, 16, sin(0, netA...)), caddr(xDst, 255, 16, sin(0, netB...))
	s := p.ask(cSPDAdd, 0, 0, out, psrc, pdst)
	id := ne.Uint32(s.ext[xPolicy][8:])
	want := bytes.Clone(out)
	ne.PutUint32(want[8:], id)
	s.same(t, want, psrc, pdst)
	if id == 0 || id&7 != 1 {
		t.Errorf("policy id %#x, want one whose low bits say out", id)
	}
	p.send(cSPDAdd, 0, 0, out, psrc, pdst)
	p.answer(cSPDAdd, 0, syscall.EEXIST)
	// The inbound one, and that which setkey makes of it for forwarding.
	back := crequest(50, 2, 3, 8, sin(0, gwB...), sin(0, gwA...))
	rsrc, rdst := caddr(xSrc, 255, 16, sin(0, netB...)), caddr(xDst, 255, 16, sin(0, netA...))
	p.ask(cSPDAdd, 0, 0, cpolicy(2, 1, 0, 0x80000000, back), rsrc, rdst)
	p.ask(cSPDAdd, 0, 0, cpolicy(2, 3, 0, 0x80000000, back), rsrc, rdst)
	// spdadd 10.1.0.0/16[any] 10.2.0.0/16[53] udp -P out prio high none; icmp6 128,0 ... discard;
	p.ask(cSPDAdd, 0, 0, cpolicy(1, 2, 0, 0x40000000), caddr(xSrc, 17, 16, sin(0, netA...)), caddr(xDst, 17, 16, sin(53, netB...)))
	p.ask(cSPDAdd, 0, 0, cpolicy(0, 2, 0, 0x40000000), caddr(xSrc, 1, 16, sin(8, netA...)), caddr(xDst, 1, 16, sin(0, netB...))).
		same(t, caddr(xSrc, 1, 16, sin(8, netA...)))
	// ah/transport//require on esp/transport//use, in the order of the text.
	two := cpolicy(2, 2, 0, 0x80000000, crequest(50, 1, 1, 0), crequest(51, 1, 2, 0))
	p.ask(cSPDAdd, 0, 0, two, src, dst)
	if l := p.dump(cSPDDump, 0); len(l) != 6 {
		t.Errorf("-DP: %d policies, want 6", len(l))
	}

	// deleteall dumps, and deletes what has the same sockaddrs, port 0 included.
	n := 0
	for _, m := range l {
		if bytes.Equal(m.ext[xSrc][8:24], sin(0, gwA...)) && bytes.Equal(m.ext[xDst][8:24], sin(0, gwB...)) {
			p.ask(cDelete, m.satype, 0, m.ext[xSA], m.ext[xSrc], m.ext[xDst])
			n++
		}
	}
	if n != 3 {
		t.Errorf("deleteall: %d SAs with these addresses, want 3", n)
	}
	// delete, spddelete of what is not there; spdflush; flush.
	p.send(cDelete, 3, 0, csa(0x1000, 0, 0, 0, 0, 0), csa2(0, 0), src, dst)
	p.answer(cDelete, 0, syscall.ESRCH)
	p.ask(cSPDDelete, 0, 0, cpolicy(0, 2, 0, 0), psrc, pdst)
	p.send(cSPDDelete, 0, 0, cpolicy(0, 2, 0, 0), psrc, pdst)
	p.answer(cSPDDelete, 0, syscall.ENOENT)
	p.ask(cSPDFlush, 0, 0)
	p.ask(cFlush, 0, 0)
	p.ask(cFlush, 0, 0) // of nothing; setkey waits for the answer all the same
	if l := append(p.dump(cDump, 0), p.dump(cSPDDump, 0)...); len(l) != 0 {
		t.Errorf("%d left", len(l))
	}
	// -x: promiscuous, it prints every message with what is in it.
	x := open(t, path, 4712)
	x.send(cPromisc, 1, 0)
	x.answer(cPromisc, 0, 0)
	p.send(cAdd, 3, 0, add...)
	for m := x.recv(); m.typ != cAdd || m.pid != p.pid; m = x.recv() {
	}
}

// racoon (ipsec-tools): REGISTER of all types, SPDDUMP, then ACQUIREs by the
// policy's id, GETSPI without a range and with ports, UPDATE, ADD, with the seq of
// the ACQUIRE, which it uses again for each renewal.
func TestClientRacoon(t *testing.T) {
	e, s, path, installed := engineAt(t)
	p, q := open(t, path, 815), open(t, path, 815) // the second only dumps; one process
	for _, typ := range []byte{2, 3, 9} {
		a := p.ask(cRegister, typ, 0)
		a.has(t, xAuths, xEncrs)
		// What its configuration usually names.
		for x, ids := range map[uint16][]byte{xAuths: {2, 3, 5, 6, 7}, xEncrs: {11, 12}} {
			for _, id := range ids {
				found := false
				for k := 8; k < len(a.ext[x]); k += 8 {
					found = found || a.ext[x][k] == id
				}
				if !found && id != 2 { // MD5 is not offered
					t.Errorf("algorithm %d of extension %d is not listed", id, x)
				}
			}
		}
	}
	if l := p.dump(cSPDDump, 0); len(l) != 0 {
		t.Errorf("%d policies", len(l))
	}
	// setkey puts a policy there; racoon hears of its id.
	other := open(t, path, 99)
	pol := cpolicy(2, 2, 0, 0x80000000, crequest(50, 2, 2, 0, sin(0, gwA...), sin(0, gwB...)))
	other.ask(cSPDAdd, 0, 0, pol, caddr(xSrc, 255, 16, sin(0, netA...)), caddr(xDst, 255, 16, sin(0, netB...)))
	id := uint32(0)
	for id == 0 {
		if m := p.recv(); m.typ == cSPDAdd {
			id = ne.Uint32(m.ext[xPolicy][8:])
		}
	}
	need := func() {
		t.Helper()
		done := make(chan bool)
		s.Do(func() {
			n := e.o.SPD.Edit().Get(id)
			go func() {
				r := n.P.Requests[0]
				e.NeedSA(n, sad.OutKey{Proto: r.Proto, Mode: r.Mode, Src: r.Src, Dst: r.Dst}, ipsec.Flow{})
				close(done)
			}()
		})
		<-done
	}
	need()
	acq := p.event(cAcquire)
	acq.has(t, xSrc, xDst, xPolicy, xProposal)
	acq.same(t, caddr(xSrc, 0, 32, sin(0, gwA...)), caddr(xDst, 0, 32, sin(0, gwB...)), cpolicy(2, 2, id, 0x80000000))
	if acq.satype != 3 || acq.seq == 0 || acq.errno != 0 {
		t.Fatalf("ACQUIRE %x", acq.raw)
	}
	// Twice the same traffic, one ACQUIRE.
	need()
	sa := func(spi uint32, state byte) []byte { return csa(spi, 4, state, 3, 12, 0) }
	keys := cat(ckey(xEncrKey, key16), ckey(xAuthKey, key20), clife(xHard, 0, 0, 28800, 0), clife(xSoft, 0, 0, 23040, 0))
	in := func(port uint16) []byte {
		return cat(caddr(xSrc, 255, 32, sin(port, gwB...)), caddr(xDst, 255, 32, sin(port, gwA...)))
	}
	outw := func(port uint16) []byte {
		return cat(caddr(xSrc, 255, 32, sin(port, gwA...)), caddr(xDst, 255, 32, sin(port, gwB...)))
	}
	negotiate := func(peerSPI uint32) (mine uint32) {
		t.Helper()
		a := p.ask(cGetSPI, 3, acq.seq, csa2(2, 0), in(500))
		if mine = a.spi(); mine < 256 {
			t.Fatalf("GETSPI: %#x", mine)
		}
		a.same(t, caddr(xSrc, 0, 32, sin(0, gwB...)), caddr(xDst, 0, 32, sin(0, gwA...)))
		p.ask(cUpdate, 3, acq.seq, sa(mine, 0), csa2(2, 0), in(0), keys).same(t, sa(mine, 1))
		p.ask(cAdd, 3, acq.seq, sa(peerSPI, 0), csa2(2, 0), outw(0), keys).same(t, sa(peerSPI, 1))
		return mine
	}
	mine := negotiate(0x1111)
	for {
		select {
		case k := <-installed:
			if k.Dst.As4() == [4]byte(gwB) {
				goto ready
			}
		case <-time.After(time.Minute):
			t.Fatal("the ACQUIRE was not answered")
		}
	}
ready:
	if l := q.dump(cDump, 3); len(l) != 2 {
		t.Errorf("%d SAs, want 2", len(l))
	}
	// A soft EXPIRE has exactly one of the two lifetimes; the seq serves again.
	s.Do(func() { e.soft(e.find(ipsec.ESP, gwB, 0x1111)) })
	x := p.event(cExpire)
	x.has(t, xSA, xCurrent, xSoft, xSrc, xDst, xSA2)
	if x.ext[xHard] != nil || x.ext[xEncrKey] != nil || x.seq != 0 {
		t.Errorf("EXPIRE %x", x.raw)
	}
	x.same(t, sa(0x1111, 2), clife(xSoft, 0, 0, 23040, 0))
	again := negotiate(0x2222)
	for _, spi := range []uint32{mine, 0x1111} {
		a := in(0)
		if spi == 0x1111 {
			a = outw(0)
		}
		p.ask(cDelete, 3, 0, csa(spi, 0, 0, 0, 0, 0), a).same(t, sa(spi, 3))
	}
	if again == mine {
		t.Error("the SPI of the SA before")
	}
	// It gives up with ENOENT, and the next packet asks again, by and by.
	p.ask(cFlush, 3, 0)
	need()
	acq = p.event(cAcquire)
	p.report(cAcquire, 3, acq.seq, byte(syscall.ENOENT))
	p.ask(cGetSPI, 3, acq.seq, csa2(2, 0), in(500)) // no answer to a report comes before
	// Policies that it makes for a peer itself: lifetimes in front of the policy.
	p.ask(cSPDUpdate, 0, 0, caddr(xSrc, 255, 16, sin(0, netB...)), caddr(xDst, 255, 16, sin(0, netA...)), clife(xHard, 0, 0, 0, 28800),
		cpolicy(2, 1, 0, 0, crequest(50, 2, 3, 0, sin(0, gwB...), sin(0, gwA...)))).has(t, xPolicy, xHard)
}

// find is a record by parts.
func (e *Engine) find(proto ipsec.Protocol, dst []byte, spi ipsec.SPI) *record {
	for id, r := range e.recs {
		if id.Proto == proto && id.SPI == spi && id.Dst.As4() == [4]byte(dst) {
			return r
		}
	}
	return nil
}

// strongSwan's kernel-pfkey: its own range for GETSPI, DELETE of the larval SA and
// ADD, addresses with protocol and prefix 0; ESP in UDP; GET, whose answer it
// sends back as UPDATE with other ports; priorities of its own, SPDADD and on
// EEXIST SPDUPDATE.
func TestClientStrongSwan(t *testing.T) {
	_, _, path, _ := engineAt(t)
	p, events := open(t, path, 31337), open(t, path, 31337)
	events.ask(cRegister, 3, 1)
	events.ask(cRegister, 2, 2)
	seq := uint32(2)
	ask := func(typ, satype byte, exts ...[]byte) *cmsg {
		t.Helper()
		seq++
		return p.ask(typ, satype, seq, exts...)
	}
	refused := func(errno syscall.Errno, typ, satype byte, exts ...[]byte) {
		t.Helper()
		seq++
		p.send(typ, satype, seq, exts...)
		p.answer(typ, seq, errno)
	}
	in := cat(caddr(xSrc, 0, 0, sin(0, gwB...)), caddr(xDst, 0, 0, sin(0, gwA...)))
	rng := func(lo, hi uint32) []byte { return cext(xRange, cat(u32(lo), u32(hi), u32(0))...) }
	a := ask(cGetSPI, 3, csa2(0, 0), in, rng(0xc0000000, 0xcfffffff))
	spi := a.spi()
	if spi>>28 != 0xc {
		t.Errorf("SPI %#x, want 0xc…", spi)
	}
	if c := ask(cGetSPI, 9, csa2(0, 0), in, rng(0x100, 0xefff)); c.spi() < 0x100 || c.spi() > 0xefff {
		t.Errorf("CPI %#x", c.spi())
	}
	// The larval SA counts as existing, and a DELETE makes room.
	natt := func(sport uint16) []byte {
		return cat(cext(xNATT, 2, 0, 0, 0), cport(xSport, sport), cport(xDport, 4500))
	}
	soft, hard := clife(xSoft, 0, 0, 3000, 0), clife(xHard, 0, 0, 3600, 0)
	params := cat(csa2(2, 1), in, soft, hard, ckey(xEncrKey, key16), ckey(xAuthKey, bytes.Repeat([]byte{0xc0}, 32)), natt(1024))
	refused(syscall.EEXIST, cAdd, 3, csa(spi, 32, 1, 5, 12, 0), params)
	ask(cDelete, 3, csa(spi, 0, 0, 0, 0, 0), in)
	ask(cAdd, 3, csa(spi, 32, 1, 5, 12, 0), params).same(t, csa(spi, 32, 1, 5, 12, 0), csa2(2, 1))
	refused(syscall.ESRCH, cDelete, 3, csa(0xdead, 0, 0, 0, 0, 0), in) // only logged
	// AES-GCM with the 16-octet ICV and without KEY_AUTH.
	ask(cAdd, 3, csa(0xcafe, 32, 1, 0, 20, 0), csa2(2, 1), caddr(xSrc, 0, 0, sin(0, gwA...)), caddr(xDst, 0, 0, sin(0, gwB...)), soft, hard, ckey(xEncrKey, key20))

	g := ask(cGet, 3, csa(spi, 0, 0, 0, 0, 0), in)
	g.has(t, xSA, xSA2, xSrc, xDst, xCurrent, xSoft, xHard, xEncrKey, xAuthKey, xNATT, xSport, xDport)
	g.same(t, soft, hard, cport(xSport, 1024), cport(xDport, 4500))
	// The peer's NAT has given it another port: all of GET's extensions back.
	ask(cUpdate, 3, g.ext[xSA], g.ext[xSA2], g.ext[xSrc], g.ext[xDst], g.ext[xSoft], g.ext[xHard], g.ext[xEncrKey], g.ext[xAuthKey], natt(2048))
	ask(cGet, 3, csa(spi, 0, 0, 0, 0, 0), in).same(t, cport(xSport, 2048), cport(xDport, 4500), g.ext[xEncrKey], g.ext[xAuthKey])

	pol := func(dir byte, id, prio uint32) []byte {
		return cpolicy(2, dir, id, prio, crequest(50, 2, 3, 1, sin(0, gwA...), sin(0, gwB...)))
	}
	sel := cat(caddr(xSrc, 255, 16, sin(0, netA...)), caddr(xDst, 255, 16, sin(0, netB...)))
	x := ask(cSPDAdd, 0, pol(2, 0, 375423), sel)
	x.has(t, xPolicy)
	id := ne.Uint32(x.ext[xPolicy][8:])
	refused(syscall.EEXIST, cSPDAdd, 0, pol(2, 0, 371327), sel)
	x = ask(cSPDUpdate, 0, pol(2, 0, 371327), sel)
	x.same(t, pol(2, id, 371327))
	ask(cSPDGet, 0, pol(2, id, 0), sel).has(t, xCurrent, xPolicy)
	ask(cSPDDelete, 0, pol(2, 0, 0), sel)
	refused(syscall.ENOENT, cSPDDelete, 0, pol(2, 0, 0), sel)
	for _, typ := range []byte{3, 2, 9} {
		ask(cFlush, typ)
	}
	ask(cSPDFlush, 0)
	if l := p.dump(cDump, 0); len(l) != 0 {
		t.Errorf("%d SAs left", len(l))
	}
}

// OpenIKED and racoon2: SPDUPDATE for new policies, with X_SA2 in front; UPDATE of
// what is not there, which becomes ADD; policies by id in a wrong direction.
func TestClientIKED(t *testing.T) {
	_, _, path, _ := engineAt(t)
	p := open(t, path, 7)
	p.ask(cFlush, 0, 1)
	p.ask(cRegister, 3, 2)
	p.ask(cRegister, 2, 3)
	p.send(cRegister, 3, 4)
	p.answer(cRegister, 4, syscall.EEXIST)
	in := cat(caddr(xSrc, 0, 0, sin(0, gwB...)), caddr(xDst, 0, 0, sin(0, gwA...)))
	a := p.ask(cGetSPI, 3, 5, in, cext(xRange, cat(u32(0x100), u32(0xffffffff), u32(0))...))
	sa := cat(csa(a.spi(), 64, 1, 3, 12, 0), in, ckey(xAuthKey, key20), ckey(xEncrKey, key16), csa2(2, 0))
	p.ask(cUpdate, 3, 6, sa)
	p.send(cUpdate, 3, 7, csa(0x4444, 64, 1, 3, 12, 0), in, ckey(xAuthKey, key20), ckey(xEncrKey, key16), csa2(2, 0))
	p.answer(cUpdate, 7, syscall.ESRCH)
	p.ask(cAdd, 3, 8, csa(0x4444, 64, 1, 3, 12, 0), in, ckey(xAuthKey, key20), ckey(xEncrKey, key16), csa2(2, 0))
	p.ask(cDelete, 3, 9, csa(0x4444, 0, 0, 0, 0, 0), in)
	p.send(cGet, 3, 10, csa(0x4444, 0, 0, 0, 0, 0), in)
	p.answer(cGet, 10, syscall.ESRCH)
	sel := cat(caddr(xSrc, 255, 16, sin(0, netB...)), caddr(xDst, 255, 16, sin(0, netA...)))
	for _, dir := range []byte{1, 3} {
		m := p.ask(cSPDUpdate, 0, 20+uint32(dir), csa2(2, 0), cpolicy(2, dir, 0, 0, crequest(50, 2, 2, 0, sin(0, gwB...), sin(0, gwA...))), sel)
		id := ne.Uint32(m.ext[xPolicy][8:])
		// An ACQUIRE's policy is asked for with its extension; racoon2 sends the id
		// back with whatever direction.
		p.ask(cSPDGet, 0, 30, cpolicy(2, 2, id, 0)).has(t, xSrc, xDst, xPolicy)
		p.ask(cSPDDelete2, 0, 31, cpolicy(2, 2, id, 0))
		p.send(cSPDDelete2, 0, 32, cpolicy(2, 2, id, 0))
		p.answer(cSPDDelete2, 32, syscall.ENOENT)
	}
	p.ask(cDelete, 3, 40, csa(a.spi(), 0, 0, 0, 0, 0), in)
}
