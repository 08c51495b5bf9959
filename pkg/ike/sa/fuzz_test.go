package sa

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/missiu/missiu/proto/ikev2"
)

// inState builds a machine in each state, from the lab; nil where a state is
// too short-lived to be met.
func inState(t testing.TB, st State, seed byte) (*lab, *node) {
	l := newLab(t)
	l.a.cfg.Rand, l.b.cfg.Rand = rand.NewChaCha8([32]byte{seed, 1}), rand.NewChaCha8([32]byte{seed, 2})
	hold := func(x ikev2.ExchangeType) { l.stop = func(p packet) bool { return p.data[18] == byte(x) } }
	switch st {
	case StateInitSent:
		hold(ikev2.IKE_SA_INIT)
	case StateAuthWait:
		l.a.holdSPI = true
	case StateAuthSent, StateHalfOpen:
		hold(ikev2.IKE_AUTH)
	case StateAuthWork:
		l.b.holdSPI = true
	}
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.a.do(l.a.sa.Start(l.now, reqA(1)))
	l.run()
	n := l.a
	switch st {
	case StateHalfOpen, StateAuthWork:
		n = l.b
	case StateRekeyed:
		hold(ikev2.INFORMATIONAL)
		l.a.do(l.a.sa.Rekey(l.now))
		l.run()
		n = l.b
	case StateDeleting:
		hold(ikev2.INFORMATIONAL)
		l.a.do(l.a.sa.Delete(l.now))
	case StateDead:
		l.a.do(l.a.sa.Delete(l.now))
		l.run()
		n = l.b
	}
	if got := n.sa.ikes[0].state; got != st {
		t.Fatalf("state %v, want %v", got, st)
	}
	return l, n
}

var fuzzStates = []State{StateInitSent, StateAuthWait, StateAuthSent, StateHalfOpen, StateAuthWork,
	StateEstablished, StateRekeyed, StateDeleting, StateDead}

// FuzzReceive feeds arbitrary datagrams to a machine in each state. Their SPIs
// are made right, so that they get as far as a forger can; with keys, nothing
// changes.
func FuzzReceive(f *testing.F) {
	type machine struct {
		l *lab
		n *node
	}
	machines := map[State]machine{}
	for _, st := range fuzzStates {
		l, n := inState(f, st, 1)
		machines[st] = machine{l, n}
		l, _ = inState(f, st, 2) // messages of other machines, whose keys are not known here
		for _, p := range l.all {
			f.Add(p.data)
		}
		for _, p := range l.kept {
			f.Add(p.data)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, st := range fuzzStates {
			m := machines[st]
			if st == StateInitSent { // what looks like an answer may be one
				m.l, m.n = inState(t, st, 1)
			}
			d := Datagram{m.n.sa.local, m.n.sa.remote, slices.Clone(b)}
			if len(b) >= 28 {
				i := m.n.sa.ikes[0]
				x, y := i.spis()
				binary.BigEndian.PutUint64(d.Data, uint64(x))
				binary.BigEndian.PutUint64(d.Data[8:], uint64(y))
				binary.BigEndian.PutUint32(d.Data[24:], uint32(len(b)))
				d.Data[19] &^= byte(ikev2.FlagInitiator)
				if !i.initiator {
					d.Data[19] |= byte(ikev2.FlagInitiator)
				}
			}
			before := m.n.sa.snapshot()
			m.n.sa.Receive(m.l.now, d)
			if after := m.n.sa.snapshot(); st != StateInitSent && after != before {
				t.Errorf("%v: changed\nbefore %s\nafter  %s", st, before, after)
			}
		}
		r := NewResponder(machines[StateHalfOpen].l.b.cfg, machines[StateHalfOpen].l.b.sa.candidate)
		r.Receive(machines[StateHalfOpen].l.now, Datagram{addrB, addrA, slices.Clone(b)})
	})
}

// FuzzInner feeds arbitrary contents under the right keys, as requests and as
// answers: a peer that is authentic and malicious. No panic, and the machine
// either goes on or has ended in order.
func FuzzInner(f *testing.F) {
	l := newQueues(f, 2, 2)
	l.establish()
	o, err := l.a.sa.newOffer(l.a.sa.cur, reqA(2), l.a.sa.children[0])
	if err != nil {
		f.Fatal(err)
	}
	o.spi, o.ni = 0x5000, make([]byte, 32)
	q, err := l.a.sa.newOffer(l.a.sa.cur, forQueue(3, 2), nil)
	if err != nil {
		f.Fatal(err)
	}
	q.spi, q.ni = 0x5001, make([]byte, 32)
	for _, ps := range [][]ikev2.Payload{o.payloads(false), {&ikev2.Delete{Protocol: ikev2.ProtocolESP, SPIs: []uint32{0x10000001}}},
		{&ikev2.Delete{Protocol: ikev2.ProtocolIKE}}, {notify(ikev2.AUTHENTICATION_FAILED)}, {notify(ikev2.INVALID_KE_PAYLOAD, 0, 19)}, q.payloads(false), {notify(ikev2.TS_MAX_QUEUE)}, nil} {
		b, err := ikev2.AppendPayloads(nil, ps)
		if err != nil {
			f.Fatal(err)
		}
		first := byte(0)
		if len(ps) > 0 {
			first = byte(ps[0].PayloadType())
		}
		f.Add(uint8(ikev2.CREATE_CHILD_SA), first, b)
		f.Add(uint8(ikev2.INFORMATIONAL), first, b)
	}
	f.Fuzz(func(t *testing.T, x, first uint8, inner []byte) {
		if len(inner) > 60000 {
			return
		}
		for _, response := range []bool{false, true} {
			l := newQueues(t, 2, 2)
			l.establish()
			i := l.a.sa.cur
			id := i.nextID
			if response {
				l.stop = func(packet) bool { return true }
				l.b.do(l.b.sa.ChildExpired(l.now, inSPI(t, l.b), false))
				l.stop, l.kept = nil, nil
				id = l.b.sa.cur.req.id
				x = uint8(l.b.sa.cur.req.exchange)
			} else {
				i.nextID++
			}
			h := i.header(ikev2.ExchangeType(x), id, response)
			l.b.do(l.b.sa.Receive(l.now, Datagram{addrB, addrA, sealRaw(t, h, i.seal, first, inner)}))
			l.run()
			if l.b.sa.failed {
				if len(told[Failed](l.b)) != 1 || len(l.b.sads) != 0 {
					t.Errorf("ended, but %d Failed, %d SAs", len(told[Failed](l.b)), len(l.b.sads))
				}
				continue
			}
			if len(l.b.sads) != 2*len(l.b.sa.children) {
				for _, c := range l.b.sa.children {
					if c.deleting {
						return
					}
				}
				t.Errorf("%d SAs for %d child SAs", len(l.b.sads), len(l.b.sa.children))
			}
		}
	})
}

// sealRaw seals octets that need not be payloads.
func sealRaw(t testing.TB, h ikev2.Header, k *sk, first uint8, inner []byte) []byte {
	b, err := (&ikev2.Message{Header: h}).AppendSealed(nil, k)
	if err != nil {
		t.Fatal(err)
	}
	b = b[:28]
	pad := (k.BlockLen() - (len(inner)+1)%k.BlockLen()) % k.BlockLen()
	body := len(inner) + pad + 1 + k.IVLen() + k.ICVLen()
	b = append(b, first, 0, byte((body+4)>>8), byte(body+4))
	b = append(b, make([]byte, k.IVLen())...)
	b = append(b, inner...)
	b = append(b, make([]byte, pad)...)
	b = append(b, byte(pad))
	b = append(b, make([]byte, k.ICVLen())...)
	binary.BigEndian.PutUint32(b[24:], uint32(len(b)))
	if err := k.Seal(b[:32], b[32:]); err != nil {
		t.Fatal(err)
	}
	return b
}
