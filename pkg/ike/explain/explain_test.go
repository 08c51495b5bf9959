package explain

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/pkg/ipsec"
)

var (
	ours   = netip.MustParseAddrPort("192.0.2.1:500")
	theirs = netip.MustParseAddrPort("192.0.2.2:500")
	ours6  = netip.MustParseAddrPort("[2001:db8::1]:4500")
	them6  = netip.MustParseAddrPort("[2001:db8::2]:1024")
)

func rule(label string, ps ...proposal.IKE) *pad.Rule {
	r := pad.NewRule(label)
	r.Remote = pad.Any()
	r.PSK = pad.Keys{Local: ipsec.NewKey([]byte("k")), Remote: ipsec.NewKey([]byte("k"))}
	if ps != nil {
		r.Proposals = ps
	}
	return r
}

// from makes the IKE_SA_INIT request of a peer with that rule.
func from(t testing.TB, local, remote netip.AddrPort, r *pad.Rule) []byte {
	t.Helper()
	m := sa.NewInitiator(sa.Config{Local: local, Remote: remote, Host: nobody{}}, r)
	for _, o := range m.Start(time.Now()) {
		if s, ok := o.(sa.Send); ok {
			return s.Data
		}
	}
	t.Fatal("no request")
	return nil
}

// answerTo is what a responder with that rule says.
func answerTo(t testing.TB, request []byte, rules ...*pad.Rule) []byte {
	t.Helper()
	m := sa.NewResponder(sa.Config{Local: theirs, Remote: ours, Host: nobody{}}, rules)
	for _, o := range m.Receive(time.Now(), sa.Datagram{Local: theirs, Remote: ours, Data: request}) {
		if s, ok := o.(sa.Send); ok {
			return s.Data
		}
	}
	t.Fatal("no answer")
	return nil
}

// packet makes an IP packet; with marker for port 4500.
func packet(src, dst netip.AddrPort, data []byte) []byte {
	if src.Port() == 4500 || dst.Port() == 4500 {
		data = append(make([]byte, 4), data...)
	}
	u := binary.BigEndian.AppendUint16(nil, src.Port())
	u = binary.BigEndian.AppendUint16(u, dst.Port())
	u = binary.BigEndian.AppendUint16(u, uint16(8+len(data)))
	u = append(append(u, 0, 0), data...)
	if src.Addr().Is4() {
		b := []byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0}
		binary.BigEndian.PutUint16(b[2:], uint16(20+len(u)))
		return append(append(append(b, src.Addr().AsSlice()...), dst.Addr().AsSlice()...), u...)
	}
	b := []byte{0x60, 0, 0, 0, 0, 0, 0, 64} // with an empty hop-by-hop header
	binary.BigEndian.PutUint16(b[4:], uint16(8+len(u)))
	b = append(append(b, src.Addr().AsSlice()...), dst.Addr().AsSlice()...)
	return append(append(b, 17, 0, 1, 4, 0, 0, 0, 0), u...)
}

var zero12 = make([]byte, 12)

// framed puts the header of a link type in front of a packet.
func framed(link uint32, p []byte) []byte {
	ether := []byte{8, 0}
	if p[0]>>4 == 6 {
		ether = []byte{0x86, 0xdd}
	}
	switch link {
	case linkEthernet:
		return append(append(append([]byte(nil), zero12...), append([]byte{0x81, 0, 0, 7}, ether...)...), append(p, 0, 0, 0)...) // a VLAN, padding
	case linkSLL:
		return append(append(make([]byte, 14), ether...), p...)
	case linkSLL2:
		return append(append(ether, make([]byte, 18)...), p...)
	case linkNull:
		return append([]byte{2, 0, 0, 0}, p...)
	}
	return p
}

func pcapOf(o binary.AppendByteOrder, link uint32, fs ...[]byte) []byte {
	b := o.AppendUint32(nil, 0xa1b2c3d4)
	b = append(b, 2, 0, 4, 0)
	b = append(b, make([]byte, 8)...)
	b = o.AppendUint32(o.AppendUint32(b, 262144), link)
	for _, f := range fs {
		b = append(b, make([]byte, 8)...)
		b = o.AppendUint32(o.AppendUint32(b, uint32(len(f))), uint32(len(f)))
		b = append(b, f...)
	}
	return b
}

func pcapngOf(o binary.AppendByteOrder, link uint32, fs ...[]byte) []byte {
	block := func(b []byte, typ uint32, body []byte) []byte {
		for len(body)%4 != 0 {
			body = append(body, 0)
		}
		b = o.AppendUint32(o.AppendUint32(b, typ), uint32(12+len(body)))
		return o.AppendUint32(append(b, body...), uint32(12+len(body)))
	}
	head := o.AppendUint32(nil, 0x1a2b3c4d)
	b := block(nil, blockSection, append(head, 1, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255))
	b = block(b, 0x0bad, []byte("of another kind"))
	b = block(b, blockInterface, o.AppendUint32(append(o.AppendUint16(nil, uint16(link)), 0, 0), 0))
	for i, f := range fs {
		if i%2 == 1 {
			b = block(b, blockSimple, append(o.AppendUint32(nil, uint32(len(f))), f...))
			continue
		}
		body := append(make([]byte, 12), o.AppendUint32(o.AppendUint32(nil, uint32(len(f))), uint32(len(f)))...)
		b = block(b, blockEnhanced, append(body, f...))
	}
	return b
}

func explained(t *testing.T, file []byte, c Config) string {
	t.Helper()
	var b strings.Builder
	if err := Capture(&b, bytes.NewReader(file), c); err != nil {
		t.Errorf("%v", err)
	}
	return b.String()
}

// Every format and link type, both families, both ports.
func TestFormats(t *testing.T) {
	p4 := packet(theirs, ours, from(t, theirs, ours, rule("peer")))
	p6 := packet(them6, ours6, from(t, them6, ours6, rule("peer")))
	for _, link := range []uint32{linkEthernet, linkSLL, linkSLL2, linkRaw, linkNull} {
		for name, file := range map[string][]byte{
			"pcap":                 pcapOf(binary.LittleEndian, link, framed(link, p4), framed(link, p6)),
			"pcap, big endian":     pcapOf(binary.BigEndian, link, framed(link, p4), framed(link, p6)),
			"pcapng":               pcapngOf(binary.LittleEndian, link, framed(link, p4), framed(link, p6)),
			"pcapng, big endian":   pcapngOf(binary.BigEndian, link, framed(link, p4), framed(link, p6)),
			"pcapng, two sections": append(pcapngOf(binary.BigEndian, linkRaw, p4), pcapngOf(binary.LittleEndian, linkRaw, p6)...),
		} {
			got := explained(t, file, Config{Rules: []*pad.Rule{rule("gate")}, IKEPort: 500, NATTPort: 4500})
			if strings.Count(got, "\n  answer: SA(") != 2 || !strings.Contains(got, "[2001:db8::2]:1024 to [2001:db8::1]:4500") || strings.Contains(got, "behind a NAT") {
				t.Errorf("link type %d, %s:\n%s", link, name, got)
			}
		}
	}
}

func TestExplanations(t *testing.T) {
	gcm := []proposal.Cipher{{Encr: alg.EncrAESGCM16, Bits: 256}}
	prf := []alg.PRF{alg.PRFHMACSHA256}
	narrow := func(kes ...alg.KE) proposal.IKE { return proposal.IKE{Ciphers: gcm, PRF: prf, KE: kes} }
	elsewhere := rule("elsewhere")
	elsewhere.Remote = []pad.Range{pad.One(netip.MustParseAddr("198.51.100.1"))}
	named := rule("named")
	named.Remote, named.RemoteHosts = nil, []string{"vpn.example.com"}
	req := from(t, theirs, ours, rule("peer", narrow(alg.KEMODP2048, alg.KEX25519), narrow(alg.KEECP521)))
	bad := bytes.Clone(req)
	bad[30] = 0xff // length of the first payload
	own := from(t, ours, theirs, rule("gate", narrow(alg.KEX25519)))
	compressing := rule("second", narrow(alg.KEMODP2048))
	compressing.IPComp = true
	for _, tt := range []struct {
		name     string
		src, dst netip.AddrPort
		data     []byte
		rules    []*pad.Rule
		local    []netip.Addr
		want     []string
		not      []string
	}{
		{"which rule, and why not the others", theirs, ours, req,
			[]*pad.Rule{elsewhere, rule("first", narrow(alg.KEECP256)), compressing}, nil,
			[]string{
				"frame 1: 192.0.2.2:500 to 192.0.2.1:500, IKE_SA_INIT request",
				"proposal 1: IKE:AES_GCM_16-256/PRF_HMAC_SHA2_256/MODP2048",
				"rule \"first\": none\n    proposal 1: no: peer offers modp2048, x25519 only; rule \"first\" wants ecp256\n    proposal 2: no: peer offers ecp521 only",
				"rule \"second\": proposal 1, ", "    proposal 1: would do", "    proposal 2: no: peer offers ecp521 only; rule \"second\" wants modp2048",
				"  answer: SA(1: IKE:AES_GCM_16-256", `IKE_AUTH decides by identity and method which rule it is: "second", preshared, peer any address, with IPComp in child SAs if the peer offers DEFLATE`,
			}, []string{"elsewhere"}},
		{"another key exchange", theirs, ours, req, []*pad.Rule{rule("gate", narrow(alg.KEX25519))}, nil,
			[]string{"answer: N(INVALID_KE_PAYLOAD: try CURVE25519)", "want x25519"}, nil},
		{"nothing fits", theirs, ours, req, []*pad.Rule{rule("gate", narrow(alg.KEECP256))}, nil,
			[]string{"answer: N(NO_PROPOSAL_CHOSEN)", "refused: IKE_SA_INIT: no proposal chosen: peer offers modp2048, x25519"}, []string{"IKE_AUTH decides"}},
		{"no rule", theirs, ours, req, []*pad.Rule{elsewhere, named}, nil,
			[]string{"no rule is for 192.0.2.1 with 192.0.2.2", "answer: N(NO_PROPOSAL_CHOSEN)", `rule "named": for vpn.example.com, whose addresses are not looked up here`}, nil},
		{"not ours", theirs, ours, req, []*pad.Rule{rule("gate")}, []netip.Addr{theirs.Addr()}, []string{"192.0.2.1 is not an address of ours"}, []string{"answer"}},
		{"NAT", netip.MustParseAddrPort("203.0.113.9:7"), ours, req, []*pad.Rule{rule("gate")}, nil,
			[]string{"the sender is behind a NAT, or says so: not 203.0.113.9:7 itself"}, []string{"the receiver is"}},
		{"malformed", theirs, ours, bad, []*pad.Rule{rule("gate")}, nil, []string{"malformed: "}, []string{"answer"}},
		{"as initiator: accepted", theirs, ours, answerTo(t, own, rule("peer")), []*pad.Rule{rule("gate", narrow(alg.KEX25519))}, nil,
			[]string{"IKE_SA_INIT response", `rule "gate": accepted, aes-gcm-16(256)`}, nil},
		{"as initiator: not what we would offer", theirs, ours, answerTo(t, own, rule("peer")), []*pad.Rule{rule("gate", narrow(alg.KEECP256))}, nil,
			[]string{`peer offers x25519 only; rule "gate" wants ecp256`}, []string{"accepted"}},
		{"as initiator: refused", theirs, ours, answerTo(t, own, rule("peer", narrow(alg.KEECP256))), []*pad.Rule{rule("gate", narrow(alg.KEX25519))}, nil,
			[]string{"notify: NO_PROPOSAL_CHOSEN", `rule "gate": refused; it offers` + "\n    1: IKE:AES_GCM_16-256/PRF_HMAC_SHA2_256/CURVE25519"}, nil},
	} {
		got := explained(t, pcapOf(binary.LittleEndian, linkRaw, packet(tt.src, tt.dst, tt.data)), Config{Rules: tt.rules, Local: tt.local})
		for _, w := range tt.want {
			if !strings.Contains(got, w) {
				t.Errorf("%s: no %q in\n%s", tt.name, w, got)
			}
		}
		for _, w := range tt.not {
			if strings.Contains(got, w) {
				t.Errorf("%s: %q in\n%s", tt.name, w, got)
			}
		}
	}
}

// Of what is sent again it is told once; what is no IKE_SA_INIT is passed over;
// fragments are said to be such.
func TestOtherPackets(t *testing.T) {
	req := from(t, theirs, ours, rule("peer"))
	p := packet(theirs, ours, req)
	frag := bytes.Clone(p)
	frag[6] = 0x20
	other := packet(netip.MustParseAddrPort("192.0.2.2:53"), netip.MustParseAddrPort("192.0.2.1:53"), req)
	got := explained(t, pcapOf(binary.LittleEndian, linkRaw, nil, other, p, p, frag), Config{Rules: []*pad.Rule{rule("gate")}})
	if !strings.HasPrefix(got, "frame 3: ") || !strings.HasSuffix(got, "frame 4: frame 3 again\nframe 5: frame 3 again\n") {
		t.Errorf("got\n%s", got)
	}
	got = explained(t, pcapOf(binary.LittleEndian, linkRaw, frag), Config{Rules: []*pad.Rule{rule("gate")}})
	if !strings.Contains(got, "only a part of it is here") {
		t.Errorf("got\n%s", got)
	}
	var b strings.Builder
	if err := Capture(&b, bytes.NewReader(pcapOf(binary.LittleEndian, linkRaw, other)), Config{}); !errors.Is(err, ErrNothing) {
		t.Errorf("got %v", err)
	}
	for name, file := range map[string][]byte{
		"empty": nil, "text": []byte("GET / HTTP/1.0\r\n\r\n"), "cut": pcapOf(binary.LittleEndian, linkRaw, p)[:50],
		"frame of 4 GiB": append(pcapOf(binary.LittleEndian, linkRaw), bytes.Repeat([]byte{255}, 16)...),
		"block of 0":     append(pcapngOf(binary.LittleEndian, linkRaw), make([]byte, 8)...),
		"interface 1":    pcapngOf(binary.LittleEndian, linkRaw, p)[:28],
	} {
		if err := Capture(&b, bytes.NewReader(file), Config{}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// What is not whole, of another version, or of a link type that nobody knows, is told
// as such rather than passed over.
func TestNotForUs(t *testing.T) {
	req := from(t, theirs, ours, rule("peer"))
	part := packet(theirs, ours, req)[:400] // the first of two fragments
	part[6] = 0x20
	binary.BigEndian.PutUint16(part[2:], 400)
	long := append(bytes.Clone(req), 0)
	version := func(v, exchange byte) []byte {
		b := bytes.Clone(req)
		b[17], b[18] = v, exchange
		return packet(theirs, ours, b)
	}
	gate := Config{Rules: []*pad.Rule{rule("gate")}}
	for _, tt := range []struct {
		name, want string
		frame      []byte
	}{
		{"a fragment", "only a part of it is here", part},
		{"cut off by the capture", "only a part of it is here", packet(theirs, ours, req)[:200]},
		{"a wrong length", "malformed: isakmp: length field does not match", packet(theirs, ours, long)},
		{"a higher version", "IKE version 3, SPI", version(0x30, 34)},
		{"a higher version is answered", "answer: N(INVALID_MAJOR_VERSION)", version(0x30, 34)},
		{"IKEv1", "IKE version 1, SPI", version(0x10, 2)},
		{"IKEv1 is not answered", "no answer: version 2 alone", version(0x10, 2)},
	} {
		var b strings.Builder
		Capture(&b, bytes.NewReader(pcapOf(binary.LittleEndian, linkRaw, tt.frame)), gate)
		if !strings.Contains(b.String(), tt.want) {
			t.Errorf("%s: no %q in\n%s", tt.name, tt.want, b.String())
		}
	}
	// A tag stands behind the header of a cooked capture, too.
	sll := append(append(make([]byte, 14), 0x81, 0, 0, 7, 8, 0), packet(theirs, ours, req)...)
	if got := explained(t, pcapOf(binary.LittleEndian, linkSLL, sll), gate); !strings.Contains(got, "answer: SA(") {
		t.Errorf("cooked, with a VLAN: %s", got)
	}
	var b strings.Builder
	if err := Capture(&b, bytes.NewReader(pcapOf(binary.LittleEndian, linkRaw, version(0x10, 2))), gate); !errors.Is(err, ErrNothing) {
		t.Errorf("IKEv1 alone: %v", err)
	}
	broken := errors.New("is a directory")
	if err := Capture(&b, iotest.ErrReader(broken), gate); !errors.Is(err, broken) {
		t.Errorf("what cannot be read: %v", err)
	}
	err := Capture(&b, bytes.NewReader(pcapOf(binary.LittleEndian, 127, packet(theirs, ours, req))), gate)
	if !errors.Is(err, ErrNothing) || !strings.Contains(err.Error(), "link types that are not known here: [127]") {
		t.Errorf("of link type 127: %v", err)
	}
}

func FuzzCapture(f *testing.F) {
	p4 := packet(theirs, ours, from(f, theirs, ours, rule("peer")))
	p6 := packet(them6, ours6, from(f, them6, ours6, rule("peer")))
	for _, link := range []uint32{linkEthernet, linkSLL, linkSLL2, linkRaw} {
		f.Add(pcapOf(binary.BigEndian, link, framed(link, p4), framed(link, p6)))
		f.Add(pcapngOf(binary.LittleEndian, link, framed(link, p4), framed(link, p6)))
	}
	f.Add(pcapOf(binary.LittleEndian, linkRaw, packet(theirs, ours, answerTo(f, from(f, ours, theirs, rule("gate")), rule("peer")))))
	c := Config{Rules: []*pad.Rule{rule("gate"), rule("other")}}
	f.Fuzz(func(t *testing.T, b []byte) {
		var out bytes.Buffer
		Capture(&out, bytes.NewReader(b), c)
		// Each message costs little more than a few times its own length.
		if out.Len() > 200000+200*len(b) {
			t.Errorf("%d octets make %d", len(b), out.Len())
		}
	})
}
