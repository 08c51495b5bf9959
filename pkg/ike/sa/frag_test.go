package sa

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/proto/ikev2"
)

// narrowLab is a lab whose messages come in small fragments.
func narrowLab(t testing.TB) *lab {
	l := newLab(t)
	l.narrow()
	return l
}

func (l *lab) narrow() { l.a.rule.FragmentSize, l.b.rule.FragmentSize = 576, 576 }

// sizes returns the octets of the longest packet of each exchange, and how many
// of its packets were fragments.
func (l *lab) sizes() (longest map[ikev2.ExchangeType]int, fragments map[ikev2.ExchangeType]int) {
	longest, fragments = map[ikev2.ExchangeType]int{}, map[ikev2.ExchangeType]int{}
	for _, p := range l.all {
		x := ikev2.ExchangeType(p.data[18])
		longest[x] = max(longest[x], len(p.data))
		if p.data[16] == byte(ikev2.PayloadSKF) {
			fragments[x]++
		}
	}
	return longest, fragments
}

// Messages of ML-KEM-768 in fragments of 576 octets, either one lost,
// duplicated or delayed.
func TestFragments(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.narrow()
		l.establish()
		l.want(1)
		longest, n := l.sizes()
		if n[ikev2.IKE_INTERMEDIATE] < 4 {
			t.Errorf("%d fragments in IKE_INTERMEDIATE, want several each way", n[ikev2.IKE_INTERMEDIATE])
		}
		for x, octets := range longest {
			if x != ikev2.IKE_SA_INIT && octets > 576-28 {
				t.Errorf("%v in %d octets, want at most %d", x, octets, 576-28)
			}
		}
		if s := l.a.sa.cur.suite; s.AddKE.Methods()[0] != alg.KEMLKEM768 {
			t.Errorf("suite %v, want ML-KEM-768", s)
		}
	})
}

// Any order, with losses and duplicates of any kind.
func TestFragmentsAnyOrder(t *testing.T) {
	for seed := range 40 {
		l := narrowLab(t)
		l.a.rule.Proposals[0].AddKE = [][]alg.KE{{alg.KEMLKEM768}, {alg.KEMLKEM1024}}
		l.b.rule.Proposals = l.a.rule.Proposals
		l.chance = rand.New(rand.NewPCG(uint64(seed), 1))
		l.establish()
		l.want(1)
	}
}

// A side that does not want fragments gets none, and sends none.
func TestFragmentationOff(t *testing.T) {
	for _, side := range []string{"a", "b"} {
		l := narrowLab(t)
		n := l.a
		if side == "b" {
			n = l.b
		}
		n.rule.FragmentSize = 0
		l.establish()
		l.want(1)
		if _, n := l.sizes(); len(n) != 0 {
			t.Errorf("%s without: fragments %v", side, n)
		}
	}
}

// Large datagrams do not pass: after two transmissions they become small, in both
// directions (RFC 7383, 2.5.2).
func TestFragmentsBecomeSmall(t *testing.T) {
	for _, dir := range []string{"both", "requests", "responses"} {
		l := newLab(t)
		l.stop = func(p packet) bool {
			return len(p.data) > 600 && p.data[18] != byte(ikev2.IKE_SA_INIT) && (dir == "both" || (p.from == l.a) == (dir == "requests"))
		}
		l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
		l.a.do(l.a.sa.Start(l.now, reqA(1)))
		l.settle()
		l.want(1)
		if wait := l.now.Sub(time.Date(2025, 1, 2, 3, 4, 5, 0, time.UTC)); wait > 5*time.Second {
			t.Errorf("%s: took %v", dir, wait)
		}
	}
}

// fragmentsOfA returns the fragments of a's IKE_INTERMEDIATE request, which b has not
// seen, with b half open.
func (l *lab) fragmentsOfA() [][]byte {
	l.t.Helper()
	l.stop = func(p packet) bool { return p.data[18] == byte(ikev2.IKE_INTERMEDIATE) && p.from == l.a }
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.a.do(l.a.sa.Start(l.now, reqA(1)))
	l.run()
	var out [][]byte
	for _, p := range l.kept {
		out = append(out, p.data)
	}
	if len(out) < 3 {
		l.t.Fatalf("%d fragments, want 3 and more", len(out))
	}
	l.stop, l.kept = nil, nil
	return out
}

func (l *lab) toB(b []byte) int {
	before := len(told[Send](l.b))
	l.b.do(l.b.sa.Receive(l.now, Datagram{addrB, addrA, slices.Clone(b)}))
	return len(told[Send](l.b)) - before
}

// Fragments that nobody honest sends are not kept, and do no harm.
func TestHostileFragments(t *testing.T) {
	l := narrowLab(t)
	fs := l.fragmentsOfA()
	r := &l.b.sa.cur.inRequest
	edit := func(f func(b []byte)) []byte {
		b := slices.Clone(fs[0])
		f(b)
		return b
	}
	number := func(at int, v uint16) func([]byte) {
		return func(b []byte) { binary.BigEndian.PutUint16(b[at:], v) }
	}
	for name, b := range map[string][]byte{
		"number 0":          edit(number(32, 0)),
		"number above":      edit(number(32, 9)),
		"total 0":           edit(number(34, 0)),
		"total 65535":       edit(number(34, 65535)),
		"total altered":     edit(number(34, 200)),
		"octet flipped":     edit(func(b []byte) { b[60] ^= 1 }),
		"next payload":      edit(func(b []byte) { b[28] ^= 1 }),
		"cut to the header": edit(func(b []byte) { binary.BigEndian.PutUint32(b[24:], 36); binary.BigEndian.PutUint16(b[30:], 8) })[:36],
	} {
		if l.toB(b); r.got != 0 || r.octets != 0 {
			t.Fatalf("%s: kept, %d fragments", name, r.got)
		}
	}
	c := l.b.sa.counters
	if c.Malformed == 0 || c.Integrity == 0 {
		t.Errorf("counters %+v, want both malformed and integrity", c)
	}
	// The same fragment again does not count twice, and one of a coarser cut of
	// the same message is passed over.
	l.toB(fs[1])
	l.toB(fs[1])
	if r.got != 1 || l.b.sa.counters.Fragments != 1 {
		t.Errorf("%d fragments kept, %d passed over; want 1, 1", r.got, l.b.sa.counters.Fragments)
	}
	coarse := l.a.recut(t, 1000)
	if l.toB(coarse[0]); r.got != 1 || len(r.parts) != len(fs) {
		t.Errorf("coarser cut: %d of %d kept, want 1 of %d", r.got, len(r.parts), len(fs))
	}
	// A finer one begins anew.
	fine := l.a.recut(t, 300)
	if l.toB(fine[2]); r.got != 1 || len(r.parts) != len(fine) {
		t.Errorf("finer cut: %d of %d kept, want 1 of %d", r.got, len(r.parts), len(fine))
	}
	// Incomplete messages are not kept for ever.
	l.step(l.now.Add(30 * time.Second))
	d := l.b.sa.Deadline()
	if d.IsZero() {
		t.Fatal("no deadline")
	}
	l.b.do(l.b.sa.Tick(l.now.Add(fragmentWait)))
	if r.got != 0 {
		t.Errorf("%d fragments left after %v", r.got, fragmentWait)
	}
}

// recut makes the fragments of n's request anew, of other sizes.
func (n *node) recut(t *testing.T, size int) [][]byte {
	t.Helper()
	p := n.sa.cur.req.sealed
	b, err := p.m.Seal(p.inner, p.k, size)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Of a request that was answered only the first fragment brings the answer again
// (RFC 7383, 2.6.1), all of it; what is not authentic does not.
func TestFragmentsReplayed(t *testing.T) {
	l := narrowLab(t)
	fs := l.fragmentsOfA()
	var n int
	for _, b := range fs {
		n = l.toB(b)
	}
	if n < 2 {
		t.Fatalf("answer of %d datagrams, want several", n)
	}
	before := l.b.sa.snapshot()
	for k, b := range fs {
		want := 0
		if k == 0 {
			want = n
		}
		if got := l.toB(b); got != want {
			t.Errorf("fragment %d again: %d datagrams, want %d", k+1, got, want)
		}
	}
	bad := slices.Clone(fs[0])
	bad[len(bad)-1] ^= 1
	if got := l.toB(bad); got != 0 {
		t.Errorf("forged first fragment: %d datagrams", got)
	}
	// A finer cut: its first fragment brings the answer, finer too.
	fine := l.a.recut(t, 300)
	if got := l.toB(fine[1]); got != 0 {
		t.Errorf("second fragment of a finer cut: %d datagrams", got)
	}
	if got := l.toB(fine[0]); got < n {
		t.Errorf("first fragment of a finer cut: %d datagrams, want %d or more", got, n)
	}
	if after := l.b.sa.snapshot(); after != before {
		t.Errorf("changed\nbefore %s\nafter  %s", before, after)
	}
}

// A message of more than 64 KiB in pieces that verify is given up.
func TestFragmentsTooMuch(t *testing.T) {
	l := narrowLab(t)
	l.establish()
	i := l.a.sa.cur
	m := &ikev2.Message{Header: i.header(ikev2.INFORMATIONAL, i.nextID, false)}
	var ps []ikev2.Payload
	for range 3 {
		ps = append(ps, &ikev2.Unknown{Type: 200, Body: make([]byte, 30000)})
	}
	m.Payloads = ps
	inner, err := ikev2.AppendPayloads(nil, ps)
	if err != nil {
		t.Fatal(err)
	}
	fs, err := m.Seal(inner, i.seal, 1200)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range fs {
		if n := l.toB(b); n != 0 {
			t.Fatalf("answered")
		}
		if l.b.sa.cur.inRequest.octets > maxInner {
			t.Fatalf("%d octets kept", l.b.sa.cur.inRequest.octets)
		}
	}
	l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
	l.settle()
	l.want(2)
}

// A cipher with blocks, AES-CTR, AES-CCM, and PRFs of AES in the IKE SA.
func TestMoreSuites(t *testing.T) {
	for _, p := range []proposal.IKE{
		{Ciphers: []proposal.Cipher{{Encr: alg.EncrAESCBC, Bits: 128}}, Integ: []alg.Integ{alg.IntegAESXCBC}, PRF: []alg.PRF{alg.PRFAESXCBC}, KE: []alg.KE{alg.KEMODP6144}},
		{Ciphers: []proposal.Cipher{{Encr: alg.EncrAESCTR, Bits: 256}}, Integ: []alg.Integ{alg.IntegAESCMAC}, PRF: []alg.PRF{alg.PRFAESCMAC}, KE: []alg.KE{alg.KEX448}},
		{Ciphers: []proposal.Cipher{{Encr: alg.EncrAESCCM16, Bits: 256}}, PRF: []alg.PRF{alg.PRFHMACSHA512}, KE: []alg.KE{alg.KEMODP8192}},
		{Ciphers: []proposal.Cipher{{Encr: alg.EncrAESCCM8, Bits: 128}}, PRF: []alg.PRF{alg.PRFHMACSHA256}, KE: []alg.KE{alg.KEMLKEM768}},
		{Ciphers: []proposal.Cipher{{Encr: alg.EncrAESGCM16, Bits: 256}}, PRF: []alg.PRF{alg.PRFHMACSHA384}, KE: []alg.KE{alg.KEMLKEM1024}, AddKE: [][]alg.KE{{alg.KEX25519}, {alg.KEECP384}}},
	} {
		l := narrowLab(t)
		l.a.rule.Proposals, l.b.rule.Proposals = []proposal.IKE{p}, []proposal.IKE{p}
		l.establish()
		l.want(1)
		l.b.do(l.b.sa.Rekey(l.now))
		l.settle()
		l.step(l.now.Add(linger + 1))
		l.want(1)
		if s := fmt.Sprint(l.a.sa.cur.suite); t.Failed() {
			t.Fatal(s)
		}
	}
}

// FuzzFragments: a peer that has the keys sends fragments of any numbers and
// contents. Memory stays bounded, and nothing panics.
func FuzzFragments(f *testing.F) {
	f.Add([]byte{0, 1, 0, 2, 3, 0, 2, 0, 2, 3}, byte(41))
	f.Add([]byte{0, 2, 0, 2, 9, 0, 1, 0, 3, 9, 0, 1, 1, 0, 1}, byte(0))
	f.Add(bytes.Repeat([]byte{0, 1, 0, 1, 0}, 4), byte(42))
	f.Fuzz(func(t *testing.T, script []byte, first byte) {
		l := newLab(t)
		l.establish()
		i := l.a.sa.cur
		m := &ikev2.Message{Header: i.header(ikev2.INFORMATIONAL, i.nextID, false)}
		for ; len(script) >= 5; script = script[5:] {
			b := sealFragment(t, m, i.seal, script[:4], first, bytes.Repeat([]byte{script[4]}, int(script[4])))
			l.b.do(l.b.sa.Receive(l.now, Datagram{addrB, addrA, b}))
			if l.b.sa.done || l.b.sa.failed {
				return
			}
			r := &l.b.sa.cur.inRequest
			if r.octets > maxInner || len(r.parts) > maxFragments || r.got > len(r.parts) {
				t.Fatalf("%d octets, %d of %d fragments", r.octets, r.got, len(r.parts))
			}
		}
	})
}

// sealFragment seals a fragment whose numbers need not make sense.
func sealFragment(t testing.TB, m *ikev2.Message, k *sk, numbers []byte, first byte, inner []byte) []byte {
	b, err := m.Append(nil)
	if err != nil {
		t.Fatal(err)
	}
	b[16] = byte(ikev2.PayloadSKF)
	pad := (k.BlockLen() - (len(inner)+1)%k.BlockLen()) % k.BlockLen()
	n := 8 + k.IVLen() + len(inner) + pad + 1 + k.ICVLen()
	b = append(b, first, 0, byte(n>>8), byte(n))
	b = append(b, numbers...)
	aad := len(b)
	b = append(b, make([]byte, k.IVLen())...)
	b = append(b, inner...)
	b = append(b, make([]byte, pad)...)
	b = append(b, byte(pad))
	b = append(b, make([]byte, k.ICVLen())...)
	binary.BigEndian.PutUint32(b[24:], uint32(len(b)))
	if err := k.Seal(b[:aad], b[aad:]); err != nil {
		t.Fatal(err)
	}
	return b
}
