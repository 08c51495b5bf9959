package pfkey

import (
	"bytes"
	"encoding/hex"
	"errors"
	"net/netip"
	"reflect"
	"strings"
	"syscall"
	"testing"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// littleEndian skips a test of literal octets on other machines.
func littleEndian(t testing.TB) {
	if host.Uint16([]byte{1, 0}) != 1 {
		t.Skip("literal octets are those of a little-endian host")
	}
}

func seq(from byte, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = from + byte(i)
	}
	return b
}

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func TestExampleAdd(t *testing.T) {
	littleEndian(t)
	wire := unhex(t, `
		02 03 00 03 1b 00 00 00  05 00 00 00 d2 04 00 00
		02 00 01 00 11 22 33 44  20 01 03 0c 00 00 00 00
		02 00 13 00 02 00 00 00  00 00 00 00 07 00 00 00
		04 00 04 00 00 00 00 00  00 00 00 00 00 00 00 00
		b8 0b 00 00 00 00 00 00  00 00 00 00 00 00 00 00
		04 00 03 00 00 00 00 00  00 00 00 00 00 00 00 00
		10 0e 00 00 00 00 00 00  00 00 00 00 00 00 00 00
		03 00 05 00 00 20 00 00  02 00 00 00 c0 00 02 01
		00 00 00 00 00 00 00 00
		03 00 06 00 00 20 00 00  02 00 00 00 c6 33 64 02
		00 00 00 00 00 00 00 00
		03 00 09 00 80 00 00 00  a0 a1 a2 a3 a4 a5 a6 a7  a8 a9 aa ab ac ad ae af
		04 00 08 00 a0 00 00 00  a0 a1 a2 a3 a4 a5 a6 a7  a8 a9 aa ab ac ad ae af
		b0 b1 b2 b3 00 00 00 00`)
	want := &Message{
		Header:  Header{Type: Add, SAType: SATypeESP, Seq: 5, Pid: 1234},
		SA:      &SA{SPI: 0x11223344, Replay: 32, State: StateMature, Auth: AuthHMACSHA1, Encrypt: EncrAESCBC},
		SA2:     &SA2{Mode: ModeTunnel, ReqID: 7},
		Soft:    &Lifetime{AddTime: 3000},
		Hard:    &Lifetime{AddTime: 3600},
		Src:     &Address{PrefixLen: 32, Addr: ap("192.0.2.1:0")},
		Dst:     &Address{PrefixLen: 32, Addr: ap("198.51.100.2:0")},
		EncrKey: &Key{128, seq(0xa0, 16)},
		AuthKey: &Key{160, seq(0xa0, 20)},
	}
	testExample(t, wire, want)
}

func TestExampleError(t *testing.T) {
	littleEndian(t)
	wire := unhex(t, `02 03 11 03 02 00 00 00 05 00 00 00 d2 04 00 00`)
	testExample(t, wire, &Message{Header: Header{
		Type: Add, Errno: uint8(syscall.EEXIST), SAType: SATypeESP, Seq: 5, Pid: 1234}})
}

func TestExampleSPDAdd(t *testing.T) {
	littleEndian(t)
	wire := unhex(t, `
		02 0e 00 00 10 00 00 00  06 00 00 00 d2 04 00 00
		08 00 12 00 02 00 02 00  00 00 00 00 00 00 00 80
		30 00 32 00 02 03 00 00  07 00 00 00 00 00 00 00
		02 00 00 00 c0 00 02 01  00 00 00 00 00 00 00 00
		02 00 00 00 c6 33 64 02  00 00 00 00 00 00 00 00
		03 00 05 00 ff 10 00 00  02 00 00 00 0a 01 00 00
		00 00 00 00 00 00 00 00
		03 00 06 00 ff 10 00 00  02 00 00 00 0a 02 00 00
		00 00 00 00 00 00 00 00`)
	want := &Message{
		Header: Header{Type: XSPDAdd, Seq: 6, Pid: 1234},
		Policy: &Policy{Type: PolicyIPsec, Dir: DirOut, Priority: 0x80000000, Requests: []Request{{
			Proto: 50, Mode: ModeTunnel, Level: LevelUnique, ReqID: 7,
			Src: netip.MustParseAddr("192.0.2.1"), Dst: netip.MustParseAddr("198.51.100.2"),
		}}},
		Src: &Address{Proto: AnyProto, PrefixLen: 16, Addr: ap("10.1.0.0:0")},
		Dst: &Address{Proto: AnyProto, PrefixLen: 16, Addr: ap("10.2.0.0:0")},
	}
	testExample(t, wire, want)
}

func TestExampleIPv6Address(t *testing.T) {
	littleEndian(t)
	wire := unhex(t, `
		02 05 00 03 07 00 00 00  00 00 00 00 00 00 00 00
		05 00 05 00 00 80 00 00  0a 00 00 00 00 00 00 00
		20 01 0d b8 00 00 00 00  00 00 00 00 00 00 00 01
		00 00 00 00 00 00 00 00`)
	testExample(t, wire, &Message{
		Header: Header{Type: Get, SAType: SATypeESP},
		Src:    &Address{PrefixLen: 128, Addr: ap("[2001:db8::1]:0")},
	})
}

func testExample(t *testing.T, wire []byte, want *Message) {
	t.Helper()
	got, err := Decode(wire)
	if err != nil {
		t.Fatalf("Decode: %v", err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("Decode:\n got %v\nwant %v", got, want)
	}
	b, err := want.Append(nil)
	if err != nil {
		t.Fatalf("Append: %v", err)
	}
	if !bytes.Equal(b, wire) {
		t.Errorf("Append:\n got %x\nwant %x", b, wire)
	}
}

// full returns a message with every extension.
func full(typ MsgType) *Message {
	a4 := &Address{Proto: 6, PrefixLen: 24, Addr: ap("192.0.2.1:500")}
	a6 := &Address{Proto: 17, PrefixLen: 64, Addr: ap("[2001:db8::1]:4500")}
	lt := func(n uint64) *Lifetime { return &Lifetime{uint32(n), n << 33, n + 2, n + 3} }
	v4, v6 := netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("2001:db8::9")
	return &Message{
		Header: Header{Type: typ, Errno: 3, SAType: SATypeAH, Seq: 0x01020304, Pid: 77},
		SA:     &SA{1<<31 + 5, 64, StateDying, AuthHMACSHA256, EncrAESGCM16, FlagXESN},
		SA2:    &SA2{ModeTransport, 9, 8}, Current: lt(1), Soft: lt(2), Hard: lt(3),
		Policy: &Policy{PolicyIPsec, DirIn, 17, 5, []Request{
			{Proto: 108, Mode: ModeTransport, Level: LevelUse},
			{50, ModeTunnel, LevelUnique, 7, v4, v4.Next()},
			{51, ModeTunnel, LevelRequire, 0, v6, v6.Next()},
		}},
		Src: a4, Dst: a6, Proxy: a6, EncrKey: &Key{12, []byte{0xab, 0xc0}}, AuthKey: NewKey(seq(0, 33)),
		IdentSrc:    &Identity{IdentFQDN, 0, "gateway.example"},
		IdentDst:    &Identity{IdentUserFQDN, 1000, ""},
		Sensitivity: &Sensitivity{1, 2, 3, []uint64{4, 5}, []uint64{6}},
		Proposal: &Proposal{32, []Comb{
			{AuthHMACSHA1, EncrAESCBC, 1, 160, 161, 128, 256, *lt(4), *lt(5)}, {Encrypt: EncrAESGCM16},
		}},
		SupportedAuth: &Supported{[]Alg{{5, 0, 256, 256}, {3, 0, 160, 160}}},
		SupportedEncr: &Supported{[]Alg{{20, 8, 160, 288}}},
		SPIRange:      &SPIRange{256, 0xfffffff}, KMPrivate: &KMPrivate{},
		NATT: &NATT{NATTESP}, NATTSPort: &NATTPort{4500}, NATTDPort: &NATTPort{4501}, NATTOA: a4,
		SecCtx:    &SecCtx{1, 2, seq(1, 11)},
		KMAddress: &KMAddress{ap("[2001:db8::1]:500"), ap("[2001:db8::2]:501")},
		Filter:    &Filter{[16]byte{10, 1}, [16]byte{10, 2}, 2, 16, 24},
		OptIn:     &OptIn{1}, SAMore: &SAMore{true, true, 1400, 4096, 7, 1 << 40, 1 << 41, 1 << 42},
		TSSrc: &TSList{[]TS{{6, 80, 443, v4, v4.Next()}, {0, 65535, 0, v6, v6}}}, TSDst: &TSList{},
		Flow:  &Flow{17, 53, 5353, v6, v6.Next()},
		SADst: a4, HomeSrc: a4, HomeDst: a4, Blob: &Blob{100, 50, seq(1, 13)}, Count: &Count{1 << 50},
		PolicyMore: &PolicyMore{PolicyFlagPerFlow | PolicyFlagInit, 1 << 40},
		Shapes:     &Shapes{[]Shape{{}, {KindAH, AuthHMACSHA256}, {KindAHESP, 0}}},
		SASeq:      &Count{1 << 51}, SACPI: &Count{0x1234}, Idle: lt(9), Queue: &Queue{3, true},
	}
}

func allTypes() []MsgType {
	var l []MsgType
	for i := range 256 {
		if t := MsgType(i); t.Valid() {
			l = append(l, t)
		}
	}
	return l
}

func TestRoundTrip(t *testing.T) {
	for _, typ := range allTypes() {
		want := full(typ)
		b, err := want.Append(nil)
		if err != nil {
			t.Fatalf("%v: Append: %v", typ, err)
		}
		got, err := Decode(b)
		if err != nil {
			t.Fatalf("%v: Decode: %v", typ, err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%v:\n got %v\nwant %v", typ, got, want)
		}
		if !strings.HasPrefix(got.String(), typ.String()+" ") {
			t.Errorf("String: got %q", got)
		}
	}
}

// full must set each field, else the round trip proves nothing about it.
func TestFullIsFull(t *testing.T) {
	v := reflect.ValueOf(*full(Add))
	for i := range v.NumField() {
		if v.Field(i).IsZero() {
			t.Errorf("full leaves %s unset", v.Type().Field(i).Name)
		}
	}
	if got, want := len(order), v.NumField()-1; got != want {
		t.Errorf("order has %d extensions, Message %d", got, want)
	}
}

// Every cut of the datagram fails; with the length field made to fit, every cut
// fails that is not between two extensions.
func TestTruncation(t *testing.T) {
	b, err := full(Add).Append(nil)
	if err != nil {
		t.Fatal(err)
	}
	bounds := map[int]bool{lenHeader: true}
	for n := lenHeader; n < len(b); {
		n += int(host.Uint16(b[n:])) * wordLen
		bounds[n] = true
	}
	for n := range len(b) {
		if _, err := Decode(b[:n]); !errors.Is(err, syscall.EMSGSIZE) {
			t.Errorf("first %d octets: got %v, want EMSGSIZE", n, err)
		}
		if n%wordLen != 0 || n < lenHeader {
			continue
		}
		c := bytes.Clone(b[:n])
		host.PutUint16(c[4:], uint16(n/wordLen))
		if _, err := Decode(c); bounds[n] != (err == nil) {
			t.Errorf("first %d octets with that length: got %v", n, err)
		}
	}
}

func TestKeysDoNotPrint(t *testing.T) {
	m := &Message{Header: Header{Type: Add}, EncrKey: NewKey([]byte("secretsecretsecr")), AuthKey: NewKey([]byte("hidden"))}
	s := m.String()
	for _, bad := range []string{"secret", "hidden", hex.EncodeToString([]byte("hidden")), "[104 105"} {
		if strings.Contains(s, bad) {
			t.Errorf("String shows %q: %s", bad, s)
		}
	}
	if !strings.Contains(s, "KEY_ENCRYPTKey(128 bits)") {
		t.Errorf("String: got %s", s)
	}
}

func TestNames(t *testing.T) {
	for _, tt := range []struct {
		got, want string
	}{
		{MsgType(14).String(), "X_SPDADD"}, {MsgType(99).String(), "MsgType(99)"},
		{ExtType(18).String(), "X_POLICY"}, {ExtType(40999).String(), "ExtType(40999)"},
		{SAType(3).String(), "ESP"}, {SAType(4).String(), "SAType(4)"},
		{AuthAlg(251).String(), "null"}, {EncrAlg(28).String(), "chacha20-poly1305"}, {CompAlg(2).String(), "deflate"},
		{SAState(1).String(), "MATURE"}, {Mode(3).String(), "beet"}, {Dir(3).String(), "fwd"}, {Level(9).String(), "Level(9)"},
		{PolicyType(2).String(), "ipsec"}, {IdentityType(2).String(), "FQDN"}, {NATTType(2).String(), "espinudp"},
	} {
		if tt.got != tt.want {
			t.Errorf("got %s, want %s", tt.got, tt.want)
		}
	}
	for i := MsgType(1); i <= maxPublicMsgType; i++ {
		if strings.Contains(i.String(), "(") {
			t.Errorf("message %d has no name", i)
		}
	}
	for i := MsgType(minPrivateMsg); i <= maxPrivateMsg; i++ {
		if strings.Contains(i.String(), "(") {
			t.Errorf("message %d has no name", i)
		}
	}
	for i := ExtType(1); i <= maxPublicExt; i++ {
		if strings.Contains(i.String(), "(") || new(Message).slot(i, false) == nil {
			t.Errorf("extension %d has no name or no decoder", i)
		}
	}
}
