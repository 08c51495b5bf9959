package sa

import (
	"encoding/binary"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/crypto/dh"
	"github.com/missiu/missiu/pkg/ike/cred/credtest"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// nonsense is a peer that knows the keys and says whatever a script has it say,
// to a machine in either role and any state.
type nonsense struct {
	*lab
	n      *node // the machine
	other  *node // the honest peer that it has taken the place of
	r      *rand.Rand
	script *bytesSource
	public map[alg.KE][]byte
	polite bool   // most of it makes sense: it gets further
	ca     []byte // certificate, if there are any
}

// newNonsense chooses how both sides are set up, and how far they come before the
// peer turns.
func newNonsense(t testing.TB, b []byte) *nonsense {
	s := &bytesSource{b}
	z := &nonsense{script: s, r: rand.New(s), public: map[alg.KE][]byte{}}
	switch z.r.IntN(3) {
	case 0:
		var ca *credtest.Cert
		z.lab, ca = certLab(t, "p256", "ed25519")
		z.ca = ca.Raw
	default:
		z.lab = newLab(t)
	}
	features := z.r.IntN(32)
	z.polite = z.r.IntN(2) == 0
	if features&1 != 0 {
		z.plain()
	}
	if features&2 != 0 {
		z.hybrid()
	}
	if features&4 != 0 {
		leasing(t, z.lab)
	}
	if features&8 != 0 {
		z.narrow()
	}
	if features&16 != 0 {
		z.a.ppk(pad.PPKPrefer, "p", "p", "a post-quantum pre-shared key!!!")
		z.b.ppk(pad.PPKPrefer, "p", "p", "a post-quantum pre-shared key!!!")
	}
	z.a.policies = []Policy{reqA(0).Policy}
	reqs := []ChildRequest{reqA(1)}
	if features&4 != 0 {
		reqs = askAll()
	}
	z.n, z.other = z.a, z.b
	if z.r.IntN(2) == 0 {
		z.n, z.other = z.b, z.a
	}
	// From the hold-th message on, the honest peer is not heard.
	left := z.r.IntN(16)
	z.a.holdSPI = z.r.IntN(8) == 0
	z.b.holdSPI = z.r.IntN(8) == 0
	z.stop = func(packet) bool { left--; return left < 0 }
	z.a.sa = NewInitiator(z.a.cfg, z.a.rule)
	z.a.do(z.a.sa.Start(z.now, reqs...))
	z.run()
	z.stop = func(packet) bool { return true }
	if z.n.sa == nil {
		z.n = z.a
	}
	return z
}

func (z *nonsense) bytes(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(z.r.IntN(256))
	}
	return b
}

// spi is one that exists, mostly.
func (z *nonsense) spi() uint32 {
	cs := z.n.sa.children
	if len(cs) == 0 || z.r.IntN(4) == 0 {
		return uint32(z.r.IntN(1000)) + 0x66000000
	}
	c := cs[z.r.IntN(len(cs))]
	if z.r.IntN(8) == 0 {
		return uint32(c.in)
	}
	return uint32(c.outSPI)
}

func (z *nonsense) protocol() ikev2.ProtocolID {
	return []ikev2.ProtocolID{ikev2.ProtocolESP, ikev2.ProtocolESP, ikev2.ProtocolESP, ikev2.ProtocolAH, ikev2.ProtocolIKE, 0, 9}[z.r.IntN(7)]
}

func (z *nonsense) ke() *ikev2.KE {
	all := []alg.KE{alg.KEX25519, alg.KEX25519, alg.KEMLKEM768, alg.KEECP256}
	return z.keOf(all[z.r.IntN(len(all))])
}

// next is one by the method that a series waits for.
func (z *nonsense) next(otherwise alg.KE) *ikev2.KE {
	if i := z.n.sa.cur; i != nil && i.follow != nil {
		otherwise = i.follow.methods[len(i.follow.secrets)]
	}
	return z.keOf(otherwise)
}

func (z *nonsense) keOf(m alg.KE) *ikev2.KE {
	k := &ikev2.KE{Method: ikev2.KEID(m)}
	if z.public[m] == nil {
		if p, err := dh.Generate(m, z.n.cfg.Rand); err == nil {
			z.public[m] = p.Public()
		}
	}
	bad := z.r.IntN(6)
	if z.polite {
		bad = z.r.IntN(40)
	}
	switch bad {
	case 0:
		k.Data = make([]byte, len(z.public[m]))
	case 1:
		k.Data = z.bytes(z.r.IntN(40))
	default:
		k.Data = slices.Clone(z.public[m])
	}
	return k
}

func (z *nonsense) selectors() []ikev2.TrafficSelector {
	ts := toWire(selectorsOf("10.1.0.0/16", "10.2.0.0/16", "10.2.3.4/32", "0.0.0.0/0", "::/0")[z.r.IntN(5):])
	return ts[:z.r.IntN(len(ts)+1)]
}

func selectorsOf(ps ...string) (l []ipsec.TrafficSelector) {
	for _, p := range ps {
		r := pad.Prefix(pfx(p))
		l = append(l, ipsec.TrafficSelector{Start: r.From, End: r.To, PortHi: 65535})
	}
	return l
}

// payload is one of every kind that there is, more or less well made.
func (z *nonsense) payload() ikev2.Payload {
	r := z.r
	switch r.IntN(24) {
	case 0, 1:
		p := z.n.policies[r.IntN(len(z.n.policies))]
		ps := proposal.WithAnyKE(proposal.WithKE(proposal.ForChild(p.alternatives(), z.n.rule.PFS, proposal.ESNPrefer), alg.KEX25519))
		if r.IntN(2) == 0 {
			for i := range ps {
				ps[i].KE = nil
			}
		}
		return proposal.OfferChild(ps, ipsec.SPI(z.spi()), r.IntN(3) == 0)
	case 2:
		return proposal.OfferIKE(z.n.rule.Proposals, z.bytes([]int{8, 8, 8, 0, 4}[r.IntN(5)]))
	case 3:
		sa := proposal.OfferIKE(z.n.rule.Proposals, make([]byte, 8))
		for i := range sa.Proposals {
			sa.Proposals[i].Protocol = z.protocol()
		}
		return sa
	case 4:
		return &ikev2.Nonce{Data: z.bytes(32)}
	case 5:
		return z.ke()
	case 6:
		return &ikev2.TSi{Selectors: z.selectors()}
	case 7:
		return &ikev2.TSr{Selectors: z.selectors()}
	case 8:
		return &ikev2.Notify{Protocol: z.protocol(), SPI: binary.BigEndian.AppendUint32(nil, z.spi()), Type: ikev2.REKEY_SA}
	case 9:
		d := &ikev2.Delete{Protocol: z.protocol()}
		if d.Protocol == ikev2.ProtocolESP || d.Protocol == ikev2.ProtocolAH {
			for range r.IntN(5) {
				d.SPIs = append(d.SPIs, z.spi())
			}
		} else {
			d.Protocol = ikev2.ProtocolIKE
		}
		return d
	case 10:
		return &ikev2.IDi{ID: ikev2.ID{Type: ikev2.IDType(r.IntN(14)), Data: z.bytes(r.IntN(20))}}
	case 11:
		return &ikev2.IDr{ID: fqdn("a.example").Wire()}
	case 12:
		m := []ikev2.AuthMethod{ikev2.AuthPSK, ikev2.AuthSignature, ikev2.AuthRSA, 9, 10, 11, 3, 13, 0}[r.IntN(9)]
		data := z.bytes(r.IntN(80))
		if m == ikev2.AuthSignature && r.IntN(2) == 0 {
			data = append([]byte{12, 0x30, 10, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2}, data...)
		}
		return &ikev2.Auth{Method: m, Data: data}
	case 13:
		data := z.bytes(r.IntN(60))
		if z.ca != nil && r.IntN(2) == 0 {
			data = z.ca
		}
		return &ikev2.Cert{Encoding: ikev2.CertEncoding(r.IntN(16)), Data: data}
	case 14:
		return &ikev2.CertReq{Encoding: ikev2.CertEncoding(r.IntN(16)), Authority: z.bytes(r.IntN(45))}
	case 15:
		c := &ikev2.Config{Type: ikev2.CFGType(r.IntN(6))}
		for range r.IntN(6) {
			c.Attributes = append(c.Attributes, ikev2.ConfigAttribute{Type: ikev2.ConfigType(r.IntN(30)), Value: z.bytes([]int{0, 4, 8, 16, 17, 3}[r.IntN(6)])})
		}
		return c
	case 16:
		return &ikev2.EAP{Message: z.bytes(r.IntN(10))}
	case 17:
		link := z.bytes(linkLen)
		if i := z.n.sa.cur; i != nil && i.follow != nil && r.IntN(3) != 0 {
			link = slices.Clone(i.follow.link)
		}
		return notify(ikev2.ADDITIONAL_KEY_EXCHANGE, link...)
	case 18:
		return notify(ikev2.NotifyType(r.IntN(50)), z.bytes(r.IntN(4))...)
	case 19:
		return z.refusal()
	case 20:
		return notify(ikev2.NotifyType(16384+r.IntN(80)), z.bytes(r.IntN(24))...)
	case 21:
		return &ikev2.Unknown{Type: ikev2.PayloadType(100 + r.IntN(150)), Critical: r.IntN(3) == 0, Body: z.bytes(r.IntN(9))}
	case 22:
		return raw(ikev2.PayloadType(33+r.IntN(22)), z.bytes(r.IntN(24))...)
	}
	return &ikev2.VendorID{Data: z.bytes(r.IntN(16))}
}

func (z *nonsense) refusal() ikev2.Payload {
	all := []ikev2.NotifyType{ikev2.TEMPORARY_FAILURE, ikev2.CHILD_SA_NOT_FOUND, ikev2.NO_PROPOSAL_CHOSEN, ikev2.STATE_NOT_FOUND,
		ikev2.INVALID_KE_PAYLOAD, ikev2.TS_UNACCEPTABLE, ikev2.NO_ADDITIONAL_SAS, ikev2.TS_MAX_QUEUE, ikev2.INVALID_IKE_SPI,
		ikev2.INVALID_MESSAGE_ID, ikev2.INTERNAL_ADDRESS_FAILURE, ikev2.INVALID_SYNTAX, ikev2.AUTHENTICATION_FAILED}
	return notify(all[z.r.IntN(len(all))], []byte{0, 19, 0, 31}[2*z.r.IntN(2):][:2]...)
}

var exchanges = []ikev2.ExchangeType{ikev2.CREATE_CHILD_SA, ikev2.CREATE_CHILD_SA, ikev2.INFORMATIONAL, ikev2.INFORMATIONAL, ikev2.IKE_AUTH,
	ikev2.IKE_INTERMEDIATE, ikev2.IKE_FOLLOWUP_KE, ikev2.IKE_SA_INIT, 43, 240}

// wellMade are the payloads of a request that makes sense.
func (z *nonsense) wellMade(x ikev2.ExchangeType) []ikev2.Payload {
	p := z.n.policies[0]
	nonce := &ikev2.Nonce{Data: z.bytes(32)}
	switch x {
	case ikev2.CREATE_CHILD_SA:
		if z.r.IntN(3) == 0 {
			return []ikev2.Payload{proposal.OfferIKE(z.n.rule.Proposals, z.bytes(8)), nonce, z.keOf(alg.KEX25519)}
		}
		var ps []ikev2.Payload
		if z.r.IntN(2) == 0 {
			ps = append(ps, &ikev2.Notify{Protocol: ikev2.ProtocolESP, SPI: binary.BigEndian.AppendUint32(nil, z.spi()), Type: ikev2.REKEY_SA})
		}
		offer := proposal.ForChild(p.alternatives(), z.n.rule.PFS, proposal.ESNPrefer)
		if z.r.IntN(2) == 0 {
			offer = proposal.WithAddKE(proposal.WithKE(offer, alg.KEX25519), z.n.rule.ChildAddKE)
		}
		l, r, ok := policyTS(p, ipsec.Tunnel, z.n.sa.local.Addr(), z.n.sa.remote.Addr())
		if !ok {
			return nil
		}
		return append(ps, proposal.OfferChild(offer, ipsec.SPI(0x51000000+z.r.IntN(256)), false), nonce, z.keOf(alg.KEX25519),
			&ikev2.TSi{Selectors: toWire([]ipsec.TrafficSelector{r})}, &ikev2.TSr{Selectors: toWire([]ipsec.TrafficSelector{l})})
	case ikev2.INFORMATIONAL:
		if z.r.IntN(3) == 0 {
			return []ikev2.Payload{&ikev2.Delete{Protocol: ikev2.ProtocolESP, SPIs: []uint32{z.spi(), z.spi()}}}
		}
	case ikev2.IKE_INTERMEDIATE:
		return []ikev2.Payload{z.keOf(alg.KEMLKEM768)}
	case ikev2.IKE_FOLLOWUP_KE:
		link := z.bytes(linkLen)
		if i := z.n.sa.cur; i != nil && i.follow != nil {
			link = slices.Clone(i.follow.link)
		}
		return []ikev2.Payload{z.next(alg.KEMLKEM768), notify(ikev2.ADDITIONAL_KEY_EXCHANGE, link...)}
	}
	return nil
}

// say seals what the peer says, in one piece or in fragments that do not always
// belong together, and hands it over.
func (z *nonsense) say() {
	s := z.n.sa
	if len(s.ikes) == 0 {
		return
	}
	i := s.ikes[z.r.IntN(len(s.ikes))]
	response := z.r.IntN(3) == 0
	x := exchanges[z.r.IntN(len(exchanges))]
	id := i.expect
	if response {
		id = i.nextID - 1
		if i.req != nil && z.r.IntN(8) != 0 {
			id, x = i.req.id, i.req.exchange
		}
	}
	switch z.r.IntN(12) {
	case 0:
		id++
	case 1:
		id--
	case 2:
		id = uint32(z.r.IntN(256)) << 24
	}
	var ps []ikev2.Payload
	rare, more := 4, z.r.IntN(5)
	if z.polite {
		rare, more = 60, more/4
		if i.follow != nil && !response && z.r.IntN(4) != 0 {
			x = ikev2.IKE_FOLLOWUP_KE
		}
	}
	switch {
	case z.polite && response && z.r.IntN(2) == 0:
		ps = []ikev2.Payload{z.refusal()}
	case z.polite || z.r.IntN(2) == 0:
		ps = z.wellMade(x)
	}
	for range more {
		ps = slices.Insert(ps, z.r.IntN(len(ps)+1), z.payload())
	}
	h := i.header(x, id, response)
	h.Flags ^= ikev2.FlagInitiator
	m := &ikev2.Message{Header: h, Payloads: ps}
	inner, err := ikev2.AppendPayloads(nil, ps)
	if err != nil || len(inner) > 20000 {
		return
	}
	if len(inner) > 0 && z.r.IntN(rare) == 0 {
		inner[z.r.IntN(len(inner))] ^= byte(1 + z.r.IntN(255))
	}
	if len(inner) > 0 && z.r.IntN(2*rare) == 0 {
		inner = inner[:z.r.IntN(len(inner))]
	}
	first := byte(0)
	if len(ps) > 0 {
		first = byte(ps[0].PayloadType())
	}
	if !i.hasKeys() {
		b, err := m.Append(nil)
		if err == nil {
			z.hear(b)
		}
		return
	}
	k := &sk{c: i.open.c}
	if z.r.IntN(4) != 0 {
		z.hear(sealRaw(z.t, h, k, first, inner))
		return
	}
	size := 20 + z.r.IntN(200)
	total := (len(inner) + size - 1) / size
	for f := 1; f <= total; f++ {
		numbers := []byte{0, byte(f), 0, byte(total)}
		switch z.r.IntN(10) {
		case 0:
			numbers[1] = byte(z.r.IntN(256))
		case 1:
			numbers[3] = byte(z.r.IntN(256))
		case 2:
			continue
		}
		part := inner[(f-1)*size : min(f*size, len(inner))]
		z.hear(sealFragment(z.t, &ikev2.Message{Header: h}, k, numbers, first, part))
	}
}

// hear hands octets to the machine, from the peer's address or, rarely, another.
func (z *nonsense) hear(b []byte) {
	d := Datagram{z.n.sa.local, z.n.sa.remote, b}
	if z.r.IntN(16) == 0 {
		d.Remote = ap("203.0.113.9:4500")
	}
	z.n.do(z.n.sa.Receive(z.now, d))
	z.check()
}

// forged is a message without keys: it must change nothing once there are some.
func (z *nonsense) forged() {
	s := z.n.sa
	if len(s.ikes) == 0 {
		return
	}
	i := s.ikes[z.r.IntN(len(s.ikes))]
	h := i.header(exchanges[z.r.IntN(len(exchanges))], i.expect, false)
	if z.r.IntN(2) == 0 {
		h = i.header(h.Exchange, i.nextID-1, true)
		if i.req != nil {
			h = i.header(i.req.exchange, i.req.id, true)
		}
	}
	h.Flags ^= ikev2.FlagInitiator
	var ps []ikev2.Payload
	for range z.r.IntN(3) {
		ps = append(ps, z.payload())
	}
	if z.r.IntN(2) == 0 {
		ps = append(ps, &ikev2.Encrypted{Body: z.bytes(40)})
	}
	b, err := (&ikev2.Message{Header: h, Payloads: ps}).Append(nil)
	if err != nil {
		return
	}
	keys, before := i.hasKeys(), s.snapshot()
	z.n.do(s.Receive(z.now, Datagram{s.local, s.remote, b}))
	if after := s.snapshot(); keys && after != before {
		z.t.Errorf("changed without keys\nbefore %s\nafter  %s", before, after)
	}
}

// check holds the machine against what is promised of it.
func (z *nonsense) check() {
	z.t.Helper()
	s := z.n.sa
	if len(s.ikes) > maxIKESAs+1 || len(s.queue) > 200 || len(s.delayed) > 100 || len(s.spiWaits) > 20 {
		z.t.Fatalf("%d IKE SAs, %d tasks, %d put off, %d wait for an SPI", len(s.ikes), len(s.queue), len(s.delayed), len(s.spiWaits))
	}
	for _, i := range s.ikes {
		for _, r := range []*reassembly{&i.inRequest, &i.inResponse} {
			if r.octets > maxInner || len(r.parts) > maxFragments {
				z.t.Fatalf("%d octets, %d fragments", r.octets, len(r.parts))
			}
		}
		if o := i.inFlight(); o != nil && len(o.deleted) > maxDeleted {
			z.t.Fatalf("%d SPIs remembered", len(o.deleted))
		}
	}
	if s.failed {
		if len(told[Failed](z.n)) != 1 || len(z.n.sads) != 0 {
			z.t.Fatalf("ended, but Failed %v, %d SAs", told[Failed](z.n), len(z.n.sads))
		}
		return
	}
	in := 0
	for id := range z.n.sads {
		if id.Dst == s.local.Addr() {
			in++
		}
	}
	if in != len(s.children) {
		z.t.Fatalf("%d inbound SAs for %d child SAs", in, len(s.children))
	}
}

// own has the machine want something itself.
func (z *nonsense) own() {
	n := z.n
	switch k := z.r.IntN(9); {
	case k == 0:
		n.do(n.sa.Rekey(z.now))
	case k == 1:
		n.add()
	case k < 5 && len(n.sa.children) > 0:
		n.expire(n.sa.children[z.r.IntN(len(n.sa.children))], k == 4)
	case k == 5 && z.r.IntN(4) == 0:
		n.do(n.sa.Delete(z.now))
	case k == 6:
		n.holdSPI = !n.holdSPI
		if !n.holdSPI {
			n.giveSPIs()
		}
	case k > 6:
		z.now = z.now.Add(time.Duration(1+z.r.IntN(40)) * time.Second)
		n.do(n.sa.Tick(z.now))
	}
	z.check()
}

// FuzzNonsense lets the fuzzer write the script of such a peer. No panic, no memory
// without bound, no change by what is not authentic, and an end in order.
func FuzzNonsense(f *testing.F) {
	for seed := range byte(24) {
		b := make([]byte, 500)
		_, _ = rand.NewChaCha8([32]byte{seed}).Read(b)
		b[0] = seed * 11
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < 4000 {
			talkNonsense(t, b)
		}
	})
}

// TestNonsense is random scripts. SA_SEEDS makes them more.
func TestNonsense(t *testing.T) {
	n := 200
	if testing.Short() {
		n = 20
	}
	if v, err := strconv.Atoi(os.Getenv("SA_SEEDS")); err == nil {
		n = v
	}
	for seed := range n {
		b := make([]byte, 1500)
		_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), 1}).Read(b)
		talkNonsense(t, b)
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

func talkNonsense(t *testing.T, b []byte) {
	t.Helper()
	z := newNonsense(t, b)
	for len(z.script.b) > 0 && !z.n.sa.done {
		switch z.r.IntN(8) {
		case 0:
			z.own()
		case 1:
			z.forged()
		default:
			z.say()
		}
		z.wire, z.kept = nil, nil
	}
	z.n.holdSPI = false
	z.n.do(z.n.sa.Drop(z.now, ErrClosed))
	z.n.giveSPIs()
	if !z.n.sa.done || len(z.n.sads) != 0 || len(z.n.spis) != 0 {
		t.Errorf("after Drop: done %v, SAs %v, SPIs %v", z.n.sa.done, z.n.sads, z.n.spis)
	}
}
