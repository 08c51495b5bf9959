package keysock

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"syscall"
	"testing"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/pfkey"
)

// TestBatch: many policies in order, more than are in flight at a time; the
// first refusal counts and says which it is; the client works on after it.
func TestBatch(t *testing.T) {
	r := start(t, ServerOptions{})
	c := r.dial()
	ctx := r.ctx()
	var ps []*ipsec.Policy
	for k := range 5 * inFlight {
		p := policy(1)
		p.Sel.Dst = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 9, byte(k >> 8), byte(k)}), 32)
		ps = append(ps, p)
	}
	if got, err := c.AddPolicies(ctx, nil); err != nil || len(got) != 0 {
		t.Errorf("no policies: %v, %v", got, err)
	}
	got, err := c.AddPolicies(ctx, ps)
	if err != nil {
		t.Fatal(err)
	}
	var ids []uint32
	for k, p := range got {
		if p.Sel != ps[k].Sel || k > 0 && p.ID <= got[k-1].ID {
			t.Fatalf("answer %d is %v with ID %d", k, p.Sel, p.ID)
		}
		ids = append(ids, p.ID)
	}
	if got, err = c.UpdatePolicies(ctx, ps); err != nil || got[7].ID != ids[7] {
		t.Errorf("update: %v, ID %d, want %d", err, got[7].ID, ids[7])
	}
	// One that exists, in the middle and twice.
	more := append([]*ipsec.Policy(nil), ps...)
	for k := range more {
		if k != 100 && k != 120 {
			p := *more[k]
			p.Sel.DstPort = 99
			more[k] = &p
		}
	}
	_, err = c.AddPolicies(ctx, more)
	var be *BatchError
	if !errors.As(err, &be) || be.Index != 100 || !errors.Is(err, syscall.EEXIST) {
		t.Errorf("got %v, want EEXIST of request 100", err)
	}
	if err := c.DeletePolicyIDs(ctx, ids); err != nil {
		t.Error(err)
	}
	if err := c.DeletePolicyIDs(ctx, []uint32{0xfffff0}); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("got %v, want ENOENT", err)
	}
	if _, err := c.DumpPolicies(ctx); err != nil {
		t.Error(err)
	}
}

// packed puts messages into one datagram.
func packed(t *testing.T, ms ...*pfkey.Message) (b []byte) {
	t.Helper()
	for _, m := range ms {
		var err error
		if b, err = m.Append(b); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

// Several messages in a datagram are requests like others, in order, with an
// answer each; only for who asked for it.
func TestPacks(t *testing.T) {
	r := start(t, ServerOptions{})
	x, plain := r.stranger(), r.stranger()
	flush := func(seq uint32) *pfkey.Message {
		return &pfkey.Message{Header: pfkey.Header{Type: pfkey.XSPDFlush, Seq: seq, Pid: 7}}
	}
	plain.sendRaw(packed(t, flush(1), flush(2)))
	plain.want(pfkey.Header{Type: pfkey.XSPDFlush, Seq: 1, Pid: 7, Errno: uint8(syscall.EMSGSIZE)})
	plain.ask(&pfkey.Message{Header: pfkey.Header{Type: pfkey.Register}, OptIn: &pfkey.OptIn{Features: pfkey.FeaturePrivate}}, 0)
	plain.sendRaw(packed(t, flush(3), flush(4)))
	plain.want(pfkey.Header{Type: pfkey.XSPDFlush, Seq: 3, Pid: 7, Errno: uint8(syscall.EMSGSIZE)})

	a := x.ask(&pfkey.Message{Header: pfkey.Header{Type: pfkey.Register}, OptIn: &pfkey.OptIn{Features: 0xff}}, 0)
	if a.OptIn == nil || a.OptIn.Features != pfkey.FeaturePrivate|pfkey.FeaturePacks {
		t.Errorf("granted %+v, want both features", a.OptIn)
	}
	var queue []byte
	want := func(what string, h pfkey.Header) {
		t.Helper()
		if len(queue) == 0 {
			queue = x.recvRaw(what)
			if len(queue) > maxPack {
				t.Errorf("%s: a datagram of %d octets", what, len(queue))
			}
		}
		var first []byte
		first, queue = pfkey.Split(queue)
		if m, err := pfkey.Decode(first); err != nil || m.Header != h {
			t.Fatalf("%s: got %+v, %v, want %+v", what, m, err, h)
		}
	}
	ok := func(seq uint32) pfkey.Header { return flush(seq).Header }
	bad := func(h pfkey.Header, err syscall.Errno) pfkey.Header { h.Errno = uint8(err); return h }
	var many []*pfkey.Message
	for k := range uint32(2000) {
		many = append(many, flush(k+10))
	}
	x.sendRaw(packed(t, many...))
	for k := range uint32(2000) {
		want("many", ok(k+10))
	}
	// A request that is refused does not take the others with it.
	get := &pfkey.Message{Header: pfkey.Header{Type: pfkey.Get, SAType: 3, Seq: 5, Pid: 7}}
	x.sendRaw(packed(t, flush(4), get, flush(6)))
	want("before a bad one", ok(4))
	want("a bad one", bad(get.Header, syscall.EINVAL))
	want("behind a bad one", ok(6))
	// Lengths that are none end the pack with one refusal; what is less than a
	// header behind it has no answer.
	for _, n := range []uint16{0, 1, 3, 0xffff} {
		b := packed(t, flush(7), flush(8), flush(9))
		binary.NativeEndian.PutUint16(b[20:], n)
		x.sendRaw(b)
		want("before a bad length", ok(7))
		if n == 3 { // 8 octets of the third
			want("a bad length", bad(ok(8), syscall.EINVAL))
			continue
		}
		want("a bad length", bad(ok(8), syscall.EMSGSIZE))
	}
	x.sendRaw(append(packed(t, flush(7), flush(8)), 1, 2, 3))
	want("before stray octets", ok(7))
	want("before stray octets", ok(8))
	x.sendRaw(packed(t, flush(11)))
	want("at last", ok(11))
}
