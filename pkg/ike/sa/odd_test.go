package sa

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
	"github.com/missiu/missiu/proto/isakmp"
)

// odd rewrites the messages of one side into others that mean the same: whatever
// RFC 7296 lets a peer do, and hardly any does.
type odd struct {
	*lab
	n *node
	r *rand.Rand
}

// chain writes payloads in another order (2.5), with reserved bits, critical bits on
// those that everybody knows (3.2), and with others between them that nobody does.
func (o *odd) chain(ps []ikev2.Payload) (first ikev2.PayloadType, b []byte) {
	extra := []ikev2.Payload{
		&ikev2.VendorID{Data: []byte("odd")}, &ikev2.VendorID{}, raw(200, 1, 2, 3), raw(32), notify(40000, 9),
		&ikev2.Notify{Protocol: ikev2.ProtocolAH, SPI: make([]byte, 16), Type: 50000},
	}
	var certs []ikev2.Payload // whose order is fixed (3.6), as is that of what only the first counts of
	var rest []ikev2.Payload
	for _, p := range ps {
		if t := p.PayloadType(); t == pCERT {
			certs = append(certs, p)
		} else {
			rest = append(rest, p)
		}
	}
	rest = append(rest, extra...)
	o.r.Shuffle(len(rest), func(i, j int) { rest[i], rest[j] = rest[j], rest[i] })
	k := o.r.IntN(len(rest) + 1)
	rest = slices.Insert(rest, k, certs...)
	for i, p := range rest {
		next := ikev2.PayloadNone
		if i+1 < len(rest) {
			next = rest[i+1].PayloadType()
		}
		body, err := p.Append(nil)
		if err != nil {
			o.t.Fatal(err)
		}
		flags := uint8(0x7f) &^ isakmp.Critical
		t := p.PayloadType()
		switch t {
		case pAUTH, ikev2.PayloadCP, pTSi, pTSr:
			copy(body[1:4], []byte{0xff, 0xff, 0xff})
		case pKE:
			body[2], body[3] = 0xff, 0xff
		case pSA:
			reservedInSA(body)
		}
		if t >= pSA && t <= ikev2.PayloadEAP {
			flags |= isakmp.Critical
		}
		b = append(b, byte(next), flags, 0, 0)
		binary.BigEndian.PutUint16(b[len(b)-2:], uint16(4+len(body)))
		b = append(b, body...)
	}
	return rest[0].PayloadType(), b
}

// reservedInSA sets the reserved octets of proposals and transforms (3.3.1, 3.3.2).
func reservedInSA(b []byte) {
	for len(b) >= 8 {
		b[1] = 0xff
		n := int(binary.BigEndian.Uint16(b[2:]))
		for t := b[8+int(b[6]) : n]; len(t) >= 8; t = t[binary.BigEndian.Uint16(t[2:]):] {
			t[1], t[5] = 0xff, 0xff
		}
		b = b[n:]
	}
}

// more adds to what is asked for, or granted, what no peer of ours knows.
func (o *odd) more(ps []ikev2.Payload, response bool) []ikev2.Payload {
	var out []ikev2.Payload
	for _, p := range ps {
		switch p := p.(type) {
		case *ikev2.SA:
			if response {
				break
			}
			// Other proposals in front, the same numbers after a gap, and in each good
			// one transforms that are none of ours (3.3.6).
			q := p.Proposals[0]
			for i, x := range p.Proposals {
				x.Transforms = slices.Clone(x.Transforms)
				for _, t := range []ikev2.Transform{
					{Type: ikev2.TransformENCR, ID: 60000}, {Type: ikev2.TransformENCR, ID: uint16(ikev2.EncrAES_GCM_16)}, // without its key length
					{Type: ikev2.TransformENCR, ID: uint16(ikev2.EncrAES_GCM_16), Attributes: []ikev2.Attribute{{Type: 14, Short: true, Value: []byte{1, 0}}, {Type: 99, Value: []byte("long")}}},
				} {
					if slices.ContainsFunc(x.Transforms, func(y ikev2.Transform) bool { return y.Type == t.Type }) {
						x.Transforms = slices.Insert(x.Transforms, o.r.IntN(len(x.Transforms)+1), t)
					}
				}
				p.Proposals[i] = x
			}
			p.Proposals = slices.Insert(p.Proposals, 0,
				ikev2.Proposal{Number: 201, Protocol: 77, SPI: []byte("eleven octe"), Transforms: q.Transforms},
				ikev2.Proposal{Number: 202, Protocol: q.Protocol, SPI: q.SPI, Transforms: append(slices.Clone(q.Transforms), ikev2.Transform{Type: 99, ID: 1})},
				ikev2.Proposal{Number: 203, Protocol: q.Protocol, SPI: append(slices.Clone(q.SPI), 1), Transforms: q.Transforms},
				ikev2.Proposal{Number: 204, Protocol: q.Protocol, SPI: q.SPI})
		case *ikev2.TSi:
			p.Selectors = append(p.Selectors, ikev2.TrafficSelector{Type: 9, Raw: []byte("fc")}, ikev2.TrafficSelector{Type: 240, Proto: 6, Raw: []byte{}})
		case *ikev2.TSr:
			p.Selectors = append([]ikev2.TrafficSelector{{Type: 10, Raw: []byte("seclabel")}}, p.Selectors...)
		case *ikev2.Auth:
			out = append(out, &ikev2.CertReq{Encoding: 200, Authority: []byte("x")}, &ikev2.CertReq{Encoding: ikev2.CertX509Signature}, &ikev2.CertReq{Encoding: 12})
		}
		out = append(out, p)
	}
	return out
}

// header has reserved flags, and a minor version that does not count (2.5).
func (o *odd) header(b []byte) {
	b[17] |= 7
	b[19] |= 0xd7
}

func (o *odd) rewrite(p packet) packet {
	s := o.n.sa
	h, _, err := ikev2.ParseHeader(p.data)
	if err != nil || h.Exchange != ikev2.IKE_SA_INIT && s.cur == nil {
		o.t.Fatal(err)
	}
	head := slices.Clone(p.data[:isakmp.HeaderLen])
	if h.Exchange == ikev2.IKE_SA_INIT {
		m, err := ikev2.Parse(slices.Clone(p.data))
		if err != nil {
			o.t.Fatal(err)
		}
		ps := m.Payloads
		if !h.IsResponse() {
			// What more is offered for an IKE SA has no SPI.
			ps = o.more(ps, false)
		}
		first, body := o.chain(ps)
		head[16] = byte(first)
		o.header(head)
		b := append(head, body...)
		if err := isakmp.Finish(b); err != nil {
			o.t.Fatal(err)
		}
		// AUTH covers what was sent.
		if hs := s.cur.hs; h.IsResponse() {
			hs.response = b
			s.cur.lastResp.data = [][]byte{b}
		} else {
			hs.request = b
		}
		p.data = b
		return p
	}
	at := slices.IndexFunc(s.ikes, func(i *ikeSA) bool { a, b := i.spis(); return a == h.InitiatorSPI && b == h.ResponderSPI })
	if at < 0 || !s.ikes[at].hasKeys() {
		return p // its last message
	}
	seal, at0 := s.ikes[at].seal, at
	op, err := ikev2.OpenOuter(p.data, seal)
	if err != nil {
		o.t.Fatal(err)
	}
	ps, err := ikev2.ParseInner(op.First, slices.Clone(op.Plain))
	if err != nil {
		o.t.Fatal(err)
	}
	first, inner := o.chain(o.more(ps, h.IsResponse()))
	o.header(head)
	b := head
	if h.Exchange != ikev2.IKE_INTERMEDIATE {
		head[16] = byte(ikev2.PayloadVendorID) // a payload in front of the Encrypted one
		b = append(b, byte(ikev2.PayloadSK), 0x7f, 0, 6, 'o', 'd')
	}
	b = append(b, byte(first), 0x7f, 0, 0)
	at = len(b)
	// More padding than is needed, of any octets (3.14).
	block := max(seal.BlockLen(), 1)
	pad := (block - (len(inner)+1)%block) % block
	pad += (255 - pad) / block * block
	b = append(b, make([]byte, seal.IVLen())...)
	b = append(b, inner...)
	for range pad {
		b = append(b, byte(o.r.IntN(256)))
	}
	b = append(b, byte(pad))
	b = append(b, make([]byte, seal.ICVLen())...)
	binary.BigEndian.PutUint16(b[at-2:], uint16(4+len(b)-at))
	if err := isakmp.Finish(b); err != nil {
		o.t.Fatal(err)
	}
	if err := seal.Seal(b[:at], b[at:]); err != nil {
		o.t.Fatal(err)
	}
	p.data = b
	if h.Exchange == ikev2.IKE_INTERMEDIATE { // AUTH covers it too
		r := s.ikes[at0].req
		r.data, r.inner = [][]byte{b}, inner
	}
	return p
}

// A peer that makes use of all that is legal is understood, in either role, in every
// exchange.
func TestOddPeer(t *testing.T) {
	for seed := range uint64(8) {
		for _, side := range []string{"initiator", "responder"} {
			for _, certs := range []bool{false, true} {
				t.Run("", func(t *testing.T) {
					l := newLab(t)
					if certs {
						l, _ = certLab(t, "p256", "ed25519")
					}
					if seed%2 == 0 || side == "responder" { // whose answers AUTH covers at once, before they can be changed
						l.plain()
					}
					l.a.rule.FragmentSize, l.b.rule.FragmentSize = 0, 0
					n := l.a
					if side == "responder" {
						n = l.b
					}
					o := &odd{l, n, rand.New(rand.NewPCG(seed, 0))}
					sent := map[string]packet{} // what is sent again is the same
					l.stop = func(p packet) bool {
						if p.from != n {
							return false
						}
						q, ok := sent[string(p.data)]
						if !ok {
							q = o.rewrite(p)
							sent[string(p.data)] = q
						}
						q.src, q.dst, q.from = p.src, p.dst, p.from
						l.inject(q)
						return true
					}
					l.establish()
					l.kept = nil
					l.want(1)
					step := func(what string, children int) {
						t.Helper()
						l.settle()
						l.kept = nil
						if l.want(children); t.Failed() {
							t.Fatalf("seed %d, odd %s, certificates %v: %s", seed, side, certs, what)
						}
					}
					step("IKE_AUTH", 1)
					l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
					step("child SA", 2)
					l.a.policies = []Policy{reqA(1).Policy}
					l.b.do(l.b.sa.AddChild(l.now, ChildRequest{Seq: 3, Policy: l.b.policies[0]}))
					step("child SA of the responder", 3)
					for _, x := range []*node{l.a, l.b} {
						_, outs := x.sa.RekeyChildren(l.now)
						x.do(outs)
						step("child SAs rekeyed", 3)
						x.do(x.sa.Rekey(l.now))
						l.settle()
						l.step(l.now.Add(linger + 1))
						step("IKE SA rekeyed", 3)
						x.do(x.sa.ChildExpired(l.now, ipsec.SAID{Proto: ipsec.ESP, Dst: x.cfg.Local.Addr(), SPI: x.sa.children[0].in}, false))
						step("one more", 3)
					}
					l.step(l.now.Add(3 * time.Minute)) // liveness
					l.kept = nil
					step("liveness", 3)
					l.a.do(l.a.sa.ChildExpired(l.now, inSPI(t, l.a), true))
					step("child SA deleted", 2)
					l.a.do(l.a.sa.Delete(l.now))
					l.settle()
					l.a.wantEnd(ErrClosed)
					l.b.wantEnd(ErrPeerDeleted)
				})
			}
		}
	}
}
