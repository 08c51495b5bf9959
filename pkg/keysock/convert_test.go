package keysock

import (
	"net/netip"
	"reflect"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/pfkey"
)

func TestEveryAlgorithmHasANumber(t *testing.T) {
	seenE := map[pfkey.EncrAlg]alg.Encr{}
	for _, e := range slices.Concat(alg.AllEncr(), alg.LegacyEncr(), []alg.Encr{alg.EncrNone}) {
		n, err := encrToWire(e)
		if err != nil {
			t.Errorf("%v: %v", e, err)
			continue
		}
		if o, ok := seenE[n]; ok {
			t.Errorf("%v and %v both have number %d", e, o, uint8(n))
		}
		seenE[n] = e
		if got, err := encrFromWire(n); got != e || err != nil {
			t.Errorf("%d: got %v, %v, want %v", uint8(n), got, err, e)
		}
	}
	seenA := map[pfkey.AuthAlg]alg.Integ{}
	for _, a := range slices.Concat(alg.AllInteg(), alg.AHInteg(), alg.LegacyInteg(), []alg.Integ{alg.IntegNone}) {
		n, err := integToWire(a)
		if err != nil {
			t.Errorf("%v: %v", a, err)
			continue
		}
		if o, ok := seenA[n]; ok {
			t.Errorf("%v and %v both have number %d", a, o, uint8(n))
		}
		seenA[n] = a
		if got, err := integFromWire(n); got != a || err != nil {
			t.Errorf("%d: got %v, %v, want %v", uint8(n), got, err, a)
		}
	}
}

func TestUnknownAlgorithms(t *testing.T) {
	_, err := encrFromWire(254)
	wantErr(t, "encryption 254", err, syscall.EINVAL)
	_, err = encrFromWire(pfkey.EncrTwofishCBC)
	wantErr(t, "encryption 253", err, syscall.ENOSYS)
	_, err = integFromWire(252)
	wantErr(t, "authentication 252", err, syscall.EINVAL)
	_, err = integFromWire(pfkey.AuthHMACSM3)
	wantErr(t, "authentication 10", err, syscall.ENOSYS)
	_, err = encrToWire(200)
	wantErr(t, "Encr(200)", err, syscall.ENOSYS)
}

func TestSupported(t *testing.T) {
	want := Supported{Encr: alg.AllEncr(), Auth: alg.AllInteg()}
	auth, encr := supportedToWire(want)
	if got := supportedFromWire(auth, encr); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for _, a := range encr.Algs {
		if pfkey.EncrAlg(a.ID) == pfkey.EncrAESGCM16 && (a.MinBits != 160 || a.MaxBits != 288 || a.IVLen != 8) {
			t.Errorf("aes-gcm-16: got %+v, want 160 to 288 bits, 8 octets of IV", a)
		}
	}
}

func encodeDecode(t *testing.T, m *pfkey.Message) *pfkey.Message {
	t.Helper()
	m.Type = pfkey.Add
	b, err := encode(m)
	if err != nil {
		t.Fatalf("encode: %v", err)
	}
	if m, err = pfkey.Decode(b); err != nil {
		t.Fatalf("Decode: %v", err)
	}
	return m
}

func TestSARoundTrip(t *testing.T) {
	want := &SAInfo{
		SAParams: *params(0x11223344), State: Dying, Seq: 9, Packets: 1 << 34, Bytes: 5,
		Added: epoch, FirstUsed: epoch.Add(time.Minute),
	}
	var m pfkey.Message
	if err := putSA(&m, want, withKeys|withPrivate|withCurrent); err != nil {
		t.Fatal(err)
	}
	got, err := takeSA(encodeDecode(t, &m))
	if err != nil {
		t.Fatal(err)
	}
	if !sameSA(got, want) {
		t.Errorf("\n got %+v\nwant %+v", got, want)
	}
}

// Without private extensions numbers that do not fit are cut downwards.
func TestSAForStrangers(t *testing.T) {
	var m pfkey.Message
	if err := putSA(&m, &SAInfo{SAParams: *params(256)}, withCurrent); err != nil {
		t.Fatal(err)
	}
	if m.EncrKey != nil || m.AuthKey != nil || m.SAMore != nil || m.TSSrc != nil {
		t.Errorf("keys or private extensions in %v", &m)
	}
	got, err := takeSA(encodeDecode(t, &m))
	if err != nil {
		t.Fatal(err)
	}
	if got.ReplayWindow != 255 || got.Hard.Packets != 1<<32-1 || !got.ESN {
		t.Errorf("got window %d, %d packets, ESN %v", got.ReplayWindow, got.Hard.Packets, got.ESN)
	}
}

func TestPolicyRoundTrip(t *testing.T) {
	full := policy(1)
	full.ID = 9
	icmp := policy(2)
	icmp.Sel.Proto, icmp.Sel.SrcPort, icmp.Sel.DstPort = 1, 9, 1
	host := policy(3)
	host.Sel.Src = netip.MustParsePrefix("10.1.3.77/24") // host bits are kept
	six := policy(4)
	six.Sel = ipsec.Selector{Src: netip.MustParsePrefix("2001:db8:1::/48"), Dst: netip.MustParsePrefix("::/0"), Proto: 58, SrcPort: 129, DstPort: 0}
	drop := &ipsec.Policy{Dir: ipsec.Fwd, Sel: full.Sel, Action: ipsec.Discard}
	for _, p := range []*ipsec.Policy{full, icmp, host, six, drop, choice()} {
		want := &PolicyInfo{Policy: *p, Added: epoch, LastUsed: epoch.Add(time.Second)}
		var m pfkey.Message
		if err := putPolicy(&m, want, withPrivate|withCurrent); err != nil {
			t.Fatal(err)
		}
		got, err := takePolicy(encodeDecode(t, &m))
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("\n got %+v\nwant %+v", got, want)
		}
	}
}

func TestICMPOnTheWire(t *testing.T) {
	for _, tt := range []struct {
		noun, wire uint16
	}{{0, 0}, {1, 256}, {2, 1}, {9, 8}, {256, 255}} {
		if got := icmpToWire(tt.noun); got != tt.wire {
			t.Errorf("icmpToWire(%d): got %d, want %d", tt.noun, got, tt.wire)
		}
		if got := icmpFromWire(tt.wire); got != tt.noun {
			t.Errorf("icmpFromWire(%d): got %d, want %d", tt.wire, got, tt.noun)
		}
	}
	s := policy(1).Sel
	s.Proto, s.SrcPort = 1, 257
	wantErr(t, "ICMP type 256", putSelector(&pfkey.Message{}, s), syscall.EINVAL)
	s.Proto = 255
	wantErr(t, "protocol 255", putSelector(&pfkey.Message{}, s), syscall.EINVAL)
}

func TestSeconds(t *testing.T) {
	for _, tt := range []struct {
		d    time.Duration
		want uint64
	}{{0, 0}, {-1, 0}, {1, 1}, {time.Second, 1}, {time.Second + 1, 2}, {time.Hour, 3600}} {
		if got := seconds(tt.d); got != tt.want {
			t.Errorf("seconds(%v): got %d, want %d", tt.d, got, tt.want)
		}
	}
	if got := duration(1 << 63); got < 290*365*24*time.Hour {
		t.Errorf("duration(1<<63): got %v, want some 292 years", got)
	}
}

// choice is a policy whose alternatives differ in their transforms.
func choice() *ipsec.Policy {
	p := policy(5)
	ah := p.Requests[0]
	ah.Proto = ipsec.AH
	p.Requests = append(p.Requests, ah)
	p.Proposals = append(p.Proposals,
		ipsec.Proposal{Shape: ipsec.ShapeAHESP, Encr: alg.EncrAESGCM16, AH: alg.IntegAESCMAC},
		ipsec.Proposal{Shape: ipsec.ShapeAH, AH: alg.IntegHMACSHA384, Hard: ipsec.Lifetime{Bytes: 7}},
		ipsec.Proposal{Shape: ipsec.ShapeAH})
	return p
}

// TestChoiceForStrangers: who did not opt in sees the first alternative of a
// policy, and of an ACQUIRE what is about its SA type.
func TestChoiceForStrangers(t *testing.T) {
	var m pfkey.Message
	if err := putPolicy(&m, &PolicyInfo{Policy: *choice()}, withCurrent); err != nil {
		t.Fatal(err)
	}
	if rs := m.Policy.Requests; len(rs) != 1 || rs[0].Proto != uint16(ipsec.ESP) || m.Shapes != nil || m.Proposal != nil {
		t.Errorf("policy: got requests %v, shapes %v", rs, m.Shapes)
	}
	for proto, want := range map[ipsec.Protocol]int{ipsec.ESP: 4, ipsec.AH: 3} {
		m = pfkey.Message{}
		if err := putAcquire(&m, &Acquire{Seq: 1, Proto: proto, Src: addr("10.0.0.1"), Dst: addr("10.0.0.2"), Proposals: choice().Proposals}, 0); err != nil {
			t.Fatal(err)
		}
		if len(m.Proposal.Combs) != want || m.Shapes != nil {
			t.Errorf("%v: got %v", proto, m.Proposal.Combs)
		}
		if proto == ipsec.AH && (m.Proposal.Combs[0].Auth != pfkey.AuthAESCMAC || m.Proposal.Combs[1].AuthMin != 384 || m.Proposal.Combs[0].Encrypt != 0) {
			t.Errorf("AH: got %v", m.Proposal.Combs)
		}
	}
}

// TestShapesRefused: shapes that do not go with the combinations.
func TestShapesRefused(t *testing.T) {
	for name, edit := range map[string]func(m *pfkey.Message){
		"no PROPOSAL":        func(m *pfkey.Message) { m.Proposal = nil },
		"too few":            func(m *pfkey.Message) { m.Shapes.Shapes = m.Shapes.Shapes[1:] },
		"ESP's of AH":        func(m *pfkey.Message) { m.Shapes.Shapes[0].Kind = pfkey.KindAH },
		"algorithm not ours": func(m *pfkey.Message) { m.Shapes.Shapes[3].AH = pfkey.AuthHMACSM3 },
	} {
		var m pfkey.Message
		if err := putPolicy(&m, &PolicyInfo{Policy: *choice()}, withPrivate); err != nil {
			t.Fatal(err)
		}
		edit(&m)
		if _, err := takePolicy(&m); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func TestAcquireRoundTrip(t *testing.T) {
	for _, ps := range [][]ipsec.Proposal{policy(1).Proposals, choice().Proposals} {
		testAcquireRoundTrip(t, ps)
	}
}

func testAcquireRoundTrip(t *testing.T, ps []ipsec.Proposal) {
	want := Acquire{
		Seq: 7, Proto: ipsec.ESP, Src: addr("2001:db8::1"), Dst: addr("2001:db8::2"), PolicyID: 3, Priority: 4,
		Mode: ipsec.Tunnel, ReqID: 8, Proposals: ps,
		Flow: &ipsec.Flow{Src: addr("10.1.0.1"), Dst: addr("10.2.0.1"), Proto: 6, SrcPort: 1025, DstPort: 80},
	}
	var m pfkey.Message
	if err := putAcquire(&m, &want, withPrivate); err != nil {
		t.Fatal(err)
	}
	if m.Policy.Type != pfkey.PolicyIPsec || m.Policy.Dir != pfkey.DirOut || len(m.Policy.Requests) != 0 {
		t.Errorf("policy: got %+v", m.Policy)
	}
	got, err := takeAcquire(encodeDecode(t, &m))
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("\n got %+v\nwant %+v", got, want)
	}
}

func TestTakeParamsRefuses(t *testing.T) {
	for _, tt := range []struct {
		name string
		edit func(m *pfkey.Message)
		want error
	}{
		{"good", func(m *pfkey.Message) {}, nil},
		{"no SA", func(m *pfkey.Message) { m.SA = nil }, syscall.EINVAL},
		{"no SRC", func(m *pfkey.Message) { m.Src = nil }, syscall.EINVAL},
		{"no DST", func(m *pfkey.Message) { m.Dst = nil }, syscall.EINVAL},
		{"two families", func(m *pfkey.Message) { m.Dst = hostAddr(addr("::1")) }, syscall.EINVAL},
		{"IPv4-mapped", func(m *pfkey.Message) { m.Src, m.Dst = hostAddr(addr("::ffff:1.2.3.4")), hostAddr(addr("::1")) }, syscall.EINVAL},
		{"SA type 0", func(m *pfkey.Message) { m.SAType = 0 }, syscall.EINVAL},
		{"SA type 5", func(m *pfkey.Message) { m.SAType = 5 }, syscall.EINVAL},
		{"IPComp with a CPI of 32 bits", func(m *pfkey.Message) { m.SAType, m.SA.Encrypt, m.SA.SPI = 9, 2, 0x12345678 }, syscall.EINVAL},
		{"IPComp with a reserved CPI", func(m *pfkey.Message) { m.SAType, m.SA.Encrypt, m.SA.SPI = 9, 2, 3 }, syscall.EINVAL},
		{"IPComp, DEFLATE", func(m *pfkey.Message) { m.NATT, m.SAType, m.SA.Encrypt, m.SA.SPI = nil, 9, 2, 0x1234 }, nil},
		{"IPComp, well-known CPI", func(m *pfkey.Message) { m.NATT, m.SAType, m.SA.Encrypt, m.SA.SPI = nil, 9, 2, 2 }, nil},
		{"IPComp, LZS", func(m *pfkey.Message) { m.SAType, m.SA.Encrypt = 9, 3 }, syscall.ENOSYS},
		{"IPComp, none", func(m *pfkey.Message) { m.SAType, m.SA.Encrypt = 9, 0 }, syscall.EINVAL},
		{"IPComp, 5", func(m *pfkey.Message) { m.SAType, m.SA.Encrypt = 9, 5 }, syscall.EINVAL},
		{"SPI 0", func(m *pfkey.Message) { m.SA.SPI = 0 }, syscall.EINVAL},
		{"SPI 255", func(m *pfkey.Message) { m.SA.SPI = 255 }, syscall.EINVAL},
		{"HARD alone", func(m *pfkey.Message) { m.Soft = nil }, syscall.EINVAL},
		{"SOFT alone", func(m *pfkey.Message) { m.Hard = nil }, syscall.EINVAL},
		{"no lifetimes", func(m *pfkey.Message) { m.Hard, m.Soft = nil, nil }, nil},
		{"no KEY_ENCRYPT", func(m *pfkey.Message) { m.EncrKey = nil }, syscall.EINVAL},
		{"KEY_ENCRYPT of 0 bits", func(m *pfkey.Message) { m.EncrKey = &pfkey.Key{} }, syscall.EINVAL},
		{"KEY_ENCRYPT of 136 bits", func(m *pfkey.Message) { m.EncrKey = pfkey.NewKey(make([]byte, 17)) }, syscall.EINVAL},
		{"KEY_ENCRYPT of 127 bits", func(m *pfkey.Message) { m.EncrKey.Bits = 127 }, syscall.EINVAL},
		{"no KEY_AUTH", func(m *pfkey.Message) { m.AuthKey = nil }, syscall.EINVAL},
		{"KEY_AUTH of 160 bits", func(m *pfkey.Message) { m.AuthKey = pfkey.NewKey(make([]byte, 20)) }, syscall.EINVAL},
		{"encryption 254", func(m *pfkey.Message) { m.SA.Encrypt = 254 }, syscall.EINVAL},
		{"encryption 7", func(m *pfkey.Message) { m.SA.Encrypt = 7 }, syscall.ENOSYS},
		{"encryption none", func(m *pfkey.Message) { m.SA.Encrypt = 0 }, syscall.EINVAL},
		{"AEAD with authentication", func(m *pfkey.Message) { m.SA.Encrypt, m.EncrKey = 20, pfkey.NewKey(make([]byte, 20)) }, syscall.EINVAL},
		{"AEAD", func(m *pfkey.Message) {
			m.SA.Encrypt, m.SA.Auth, m.EncrKey, m.AuthKey = 20, 0, pfkey.NewKey(make([]byte, 20)), nil
		}, nil},
		{"AEAD without salt", func(m *pfkey.Message) {
			m.SA.Encrypt, m.SA.Auth, m.EncrKey = 20, 0, pfkey.NewKey(make([]byte, 16))
		}, syscall.EINVAL},
		{"AEAD with a key shorter than its salt", func(m *pfkey.Message) {
			m.SA.Encrypt, m.SA.Auth, m.EncrKey = 20, 0, pfkey.NewKey(make([]byte, 2))
		}, syscall.EINVAL},
		{"NULL encryption", func(m *pfkey.Message) { m.SA.Encrypt, m.EncrKey = 11, &pfkey.Key{} }, nil},
		{"NULL with a key", func(m *pfkey.Message) { m.SA.Encrypt = 11 }, syscall.EINVAL},
		{"authentication NULL", func(m *pfkey.Message) { m.SA.Auth, m.AuthKey = 251, &pfkey.Key{} }, nil},
		{"AH", func(m *pfkey.Message) { m.SAType, m.SA.Encrypt, m.EncrKey, m.NATT = 2, 0, nil, nil }, nil},
		{"AH with encryption", func(m *pfkey.Message) { m.SAType, m.NATT = 2, nil }, syscall.EINVAL},
		{"AH without authentication", func(m *pfkey.Message) { m.SAType, m.SA.Encrypt, m.SA.Auth, m.NATT = 2, 0, 0, nil }, syscall.EINVAL},
		{"AH in UDP", func(m *pfkey.Message) { m.SAType, m.SA.Encrypt, m.EncrKey = 2, 0, nil }, syscall.EINVAL},
		{"mode any", func(m *pfkey.Message) { m.SA2.Mode = 0 }, nil},
		{"BEET", func(m *pfkey.Message) { m.SA2.Mode = 3 }, syscall.EINVAL},
		{"no SA2", func(m *pfkey.Message) { m.SA2 = nil }, nil},
		{"KAME's flags", func(m *pfkey.Message) { m.SA.Flags = 0x40 }, nil},
		{"obsolete encapsulation", func(m *pfkey.Message) { m.NATT.Type = 1 }, syscall.EINVAL},
		{"encapsulation without port", func(m *pfkey.Message) { m.NATTDPort = nil }, syscall.EINVAL},
		{"selector backwards", func(m *pfkey.Message) {
			m.TSSrc = &pfkey.TSList{TS: []pfkey.TS{{Start: addr("10.0.0.2"), End: addr("10.0.0.1")}}}
		}, syscall.EINVAL},
	} {
		var m pfkey.Message
		if err := putSA(&m, &SAInfo{SAParams: *params(0x1000)}, withKeys|withPrivate); err != nil {
			t.Fatal(err)
		}
		tt.edit(&m)
		p, err := takeParams(&m)
		wantErr(t, tt.name, err, tt.want)
		if err == nil && p.Mode != ipsec.Tunnel && p.Mode != ipsec.Transport {
			t.Errorf("%s: mode %v", tt.name, p.Mode)
		}
	}
}

func TestTakePolicyRefuses(t *testing.T) {
	for _, tt := range []struct {
		name string
		edit func(m *pfkey.Message)
		want error
	}{
		{"good", func(m *pfkey.Message) {}, nil},
		{"no policy", func(m *pfkey.Message) { m.Policy = nil }, syscall.EINVAL},
		{"no address", func(m *pfkey.Message) { m.Dst = nil }, syscall.EINVAL},
		{"two families", func(m *pfkey.Message) { m.Dst = hostAddr(addr("::1")) }, syscall.EINVAL},
		{"direction 0", func(m *pfkey.Message) { m.Policy.Dir = 0 }, syscall.EINVAL},
		{"type 3", func(m *pfkey.Message) { m.Policy.Type = 3 }, syscall.EINVAL},
		{"no request", func(m *pfkey.Message) { m.Policy.Requests = nil }, syscall.EINVAL},
		{"7 requests", func(m *pfkey.Message) { m.Policy.Requests = make([]pfkey.Request, 7) }, syscall.ELOOP},
		{"BEET", func(m *pfkey.Message) { m.Policy.Requests[0].Mode = 3 }, syscall.EINVAL},
		{"ICMP type 300", func(m *pfkey.Message) {
			m.Dst.Proto, m.Src.Addr = 1, netip.AddrPortFrom(m.Src.Addr.Addr(), 300)
		}, syscall.EINVAL},
		{"unknown cipher", func(m *pfkey.Message) { m.Proposal.Combs[0].Encrypt = 7 }, syscall.ENOSYS},
		{"key sizes backwards", func(m *pfkey.Message) { m.Proposal.Combs[0].EncryptMin = 1000 }, syscall.EINVAL},
	} {
		var m pfkey.Message
		if err := putPolicy(&m, &PolicyInfo{Policy: *policy(1)}, withPrivate); err != nil {
			t.Fatal(err)
		}
		tt.edit(&m)
		_, err := takePolicy(&m)
		wantErr(t, tt.name, err, tt.want)
	}
}

// Flags and the count of packets need the private extension; without it a policy
// that takes clear packets shows as one of level use, and a count is cut.
func TestPolicyMore(t *testing.T) {
	i := &PolicyInfo{Policy: *policy(1), Added: epoch, Packets: 1 << 40}
	i.Flags = ipsec.PolicyClear | ipsec.PolicyManual
	i.Requests = []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Transport, Level: ipsec.LevelUnique, ReqID: 7}}
	for what, want := range map[int]struct {
		flags   ipsec.PolicyFlags
		level   ipsec.Level
		packets uint64
	}{
		withCurrent | withPrivate: {i.Flags, ipsec.LevelUnique, 1 << 40},
		withCurrent:               {0, ipsec.LevelUse, 1<<32 - 1},
	} {
		var m pfkey.Message
		if err := putPolicy(&m, i, what); err != nil {
			t.Fatal(err)
		}
		got, err := takePolicy(&m)
		if err != nil {
			t.Fatal(err)
		}
		if r := got.Requests[0]; got.Flags != want.flags || r.Level != want.level || r.ReqID != 7 || got.Packets != want.packets {
			t.Errorf("%d: flags %d, level %d, reqid %d, packets %d; want %+v", what, got.Flags, r.Level, r.ReqID, got.Packets, want)
		}
	}
}
