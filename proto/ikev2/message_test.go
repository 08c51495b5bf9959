package ikev2

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/missiu/missiu/proto/isakmp"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.NewReplacer(" ", "", "\n", "").Replace(s))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// wireMessages are real messages, one of each shape.
func wireMessages(t testing.TB) [][]byte {
	t.Helper()
	f, err := os.ReadFile("testdata/messages.txt")
	if err != nil {
		t.Fatal(err)
	}
	var ms [][]byte
	for l := range strings.Lines(string(f)) {
		if !strings.HasPrefix(l, "#") {
			ms = append(ms, unhex(t, strings.TrimSpace(l)))
		}
	}
	return ms
}

type capture struct {
	Name     string
	SKei     string `json:"sk_ei"`
	SKer     string `json:"sk_er"`
	SKai     string `json:"sk_ai"`
	SKar     string `json:"sk_ar"`
	Integ    string
	Messages []string
}

func captures(t testing.TB) []capture {
	t.Helper()
	f, err := os.ReadFile("testdata/captures.json")
	if err != nil {
		t.Fatal(err)
	}
	var cs []capture
	if err := json.Unmarshal(f, &cs); err != nil {
		t.Fatal(err)
	}
	return cs
}

// Every reserved octet of these messages is zero, so they come back octet for octet.
func TestWireMessages(t *testing.T) {
	ms := wireMessages(t)
	if len(ms) < 20 {
		t.Fatalf("got %d messages, want the file's", len(ms))
	}
	for i, b := range ms {
		m, err := Parse(b)
		if err != nil {
			t.Errorf("message %d: %v", i, err)
			continue
		}
		got, err := m.Append(nil)
		if err != nil || !bytes.Equal(got, b) {
			t.Errorf("message %d: got %x, %v; want %x", i, got, err, b)
		}
		for n := range b {
			if _, err := Parse(b[:n]); err == nil {
				t.Errorf("message %d: %d of %d octets parse", i, n, len(b))
			}
		}
		// The same with the header's length made to fit: the payloads notice,
		// except where an Encrypted payload's end alone is cut, whose own
		// length notices.
		for n := isakmp.HeaderLen; n < len(b); n++ {
			cut := bytes.Clone(b[:n])
			if err := isakmp.Finish(cut); err != nil {
				t.Fatal(err)
			}
			if _, err := Parse(cut); !errors.Is(err, ErrSyntax) {
				t.Errorf("message %d cut to %d of %d octets: got %v, want %v", i, n, len(b), err, ErrSyntax)
			}
		}
	}
}

// Whole exchanges between two strongSwans, decrypted with their keys.
func TestCaptures(t *testing.T) {
	types := map[PayloadType]bool{}
	for _, c := range captures(t) {
		ci, err := newCBC(unhex(t, c.SKei), unhex(t, c.SKai), c.Integ)
		if err != nil {
			t.Fatal(err)
		}
		cr, err := newCBC(unhex(t, c.SKer), unhex(t, c.SKar), c.Integ)
		if err != nil {
			t.Fatal(err)
		}
		for i, s := range c.Messages {
			b := unhex(t, s)
			h, first, err := ParseHeader(b)
			if err != nil {
				t.Fatal(err)
			}
			if first != PayloadSK {
				if _, err := Open(b, ci); !errors.Is(err, ErrEncrypted) {
					t.Errorf("%s %d: open without SK: got %v, want %v", c.Name, i, err, ErrEncrypted)
				}
				continue
			}
			k, other := ci, cr
			if !h.FromInitiator() {
				k, other = cr, ci
			}
			if _, err := Open(b, other); !errors.Is(err, ErrIntegrity) {
				t.Errorf("%s %d: wrong key: got %v, want %v", c.Name, i, err, ErrIntegrity)
			}
			m, err := Open(b, k)
			if err != nil {
				t.Errorf("%s %d: %v", c.Name, i, err)
				continue
			}
			for _, p := range m.Payloads {
				types[p.PayloadType()] = true
			}
			for n := range b {
				b[n] ^= 1
				if _, err := Open(b, k); err == nil {
					t.Errorf("%s %d: octet %d changed, still opens", c.Name, i, n)
				}
				b[n] ^= 1
			}
			testSealed(t, m, k)
		}
	}
	for _, want := range []PayloadType{PayloadIDi, PayloadIDr, PayloadCERT, PayloadCERTREQ, PayloadAUTH,
		PayloadSA, PayloadTSi, PayloadTSr, PayloadNotify, PayloadDelete, PayloadCP} {
		if !types[want] {
			t.Errorf("no %v payload in the captures", want)
		}
	}
}

func testSealed(t *testing.T, m *Message, c Cipher) {
	t.Helper()
	prefix := []byte("in front")
	b, err := m.AppendSealed(prefix, c)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(b, prefix) {
		t.Errorf("prefix overwritten")
	}
	got, err := Open(b[len(prefix):], c)
	if err != nil {
		t.Errorf("open: %v", err)
		return
	}
	if !reflect.DeepEqual(got, m) {
		t.Errorf("got %+v, want %+v", got, m)
	}
}

// full has every payload, with every optional part.
func full() *Message {
	a4, a6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	return &Message{
		Header: Header{InitiatorSPI: 1, ResponderSPI: 2, Exchange: IKE_AUTH, Flags: FlagInitiator, MessageID: 7},
		Payloads: []Payload{
			&SA{Proposals: []Proposal{
				{Number: 1, Protocol: ProtocolESP, SPI: []byte{1, 2, 3, 4}, Transforms: []Transform{
					NewTransform(TransformENCR, EncrAES_GCM_16, 256), NewTransform(TransformESN, ESNNo, 0)}},
				{Number: 2, Protocol: ProtocolIKE, SPI: []byte{1, 2, 3, 4, 5, 6, 7, 8}, Transforms: []Transform{
					{Type: 99, ID: 5, Attributes: []Attribute{{Type: 3, Value: []byte{1, 2, 3}}, {Type: 4, Short: true, Value: []byte{1, 2}}, {Type: 5, Value: []byte{}}}}}},
				{Number: 3, Protocol: ProtocolAH, SPI: []byte{}},
			}},
			&KE{Method: KECURVE25519, Data: []byte{1, 2, 3}},
			&IDi{ID{Type: IDIPv4Addr, Data: a4.AsSlice()}},
			&IDr{ID{Type: IDFQDN, Data: []byte("a.example")}},
			&Cert{Encoding: CertX509Signature, Data: []byte{1}},
			&CertReq{Encoding: CertX509Signature, Authority: []byte{2}},
			&Auth{Method: AuthPSK, Data: []byte{3}},
			&Nonce{Data: make([]byte, 16)},
			&Notify{Protocol: ProtocolESP, SPI: []byte{1, 2, 3, 4}, Type: REKEY_SA, Data: []byte{5}},
			&Notify{SPI: []byte{}, Type: COOKIE, Data: []byte{}},
			&Delete{Protocol: ProtocolIKE},
			&Delete{Protocol: ProtocolESP, SPIs: []uint32{1, 0xffffffff}},
			&VendorID{Data: []byte("vendor")},
			&TSi{[]TrafficSelector{{Type: TSIPv4Range, Proto: 6, StartPort: 1, EndPort: 2, Start: a4, End: a4}}},
			&TSr{[]TrafficSelector{
				{Type: TSIPv6Range, EndPort: 65535, Start: a6, End: a6},
				{Type: TSSecLabel, Raw: []byte{1, 2, 3}}}},
			&Config{Type: CFGRequest, Attributes: []ConfigAttribute{{Type: ConfigIP4Address, Value: []byte{}}, {Type: ConfigIP4DNS, Value: []byte{1, 2, 3, 4}}}},
			&EAP{Message: []byte{1, 2, 0, 4}},
			&Unknown{Type: 200, Critical: true, Body: []byte{9}},
		},
	}
}

func TestRoundTrip(t *testing.T) {
	m := full()
	b, err := m.Append(nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, m) {
		t.Errorf("got %+v\nwant %+v", got, m)
	}
	if typ, ok := UnsupportedCritical(got.Payloads); !ok || typ != 200 {
		t.Errorf("UnsupportedCritical: got %v, %v; want 200", typ, ok)
	}
	if n := FindNotify(got.Payloads, COOKIE); n == nil {
		t.Error("COOKIE not found")
	}
	if Find[*KE](got.Payloads) == nil || Find[*EncryptedFragment](got.Payloads) != nil {
		t.Error("Find: wrong answer")
	}
	// Every payload alone: no truncation of its body parses to the same, and
	// none panics.
	for _, p := range m.Payloads {
		body, err := p.Append(nil)
		if err != nil {
			t.Fatal(err)
		}
		for n := range body {
			got, err := parsePayload(isakmp.Payload{Type: uint8(p.PayloadType()), Body: body[:n]})
			if err == nil && reflect.DeepEqual(got, p) {
				t.Errorf("%v: %d of %d octets give the whole", p.PayloadType(), n, len(body))
			}
		}
	}
}

func TestSealedGCM(t *testing.T) {
	c, err := newGCM(make([]byte, 36))
	if err != nil {
		t.Fatal(err)
	}
	testSealed(t, full(), c)
	testSealed(t, &Message{Header: Header{Exchange: INFORMATIONAL, Flags: FlagResponse}}, c)

	big := &Message{Payloads: []Payload{&VendorID{Data: make([]byte, 65000)}, &VendorID{Data: make([]byte, 600)}}}
	if _, err := big.AppendSealed(nil, c); !errors.Is(err, ErrValue) {
		t.Errorf("too big: got %v, want %v", err, ErrValue)
	}
}

func TestFragment(t *testing.T) {
	m := &Message{Payloads: []Payload{&EncryptedFragment{First: PayloadIDi, Number: 1, Total: 2, Body: []byte{1, 2, 3}}}}
	b, err := m.Append(nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Parse(b)
	if err != nil || !reflect.DeepEqual(got, m) {
		t.Errorf("got %+v, %v; want %+v", got, err, m)
	}
}

// raw is a payload with octets of the test's choice.
type raw struct {
	t PayloadType
	b []byte
}

func (r raw) PayloadType() PayloadType        { return r.t }
func (r raw) Append(b []byte) ([]byte, error) { return append(b, r.b...), nil }

func TestHostile(t *testing.T) {
	for _, tt := range []struct {
		name string
		typ  PayloadType
		body string
	}{
		{"SA empty", PayloadSA, ""},
		{"SA marker 1", PayloadSA, "01000008 01030000"},
		{"SA marker says more", PayloadSA, "02000008 01030000"},
		{"SA octets behind the last proposal", PayloadSA, "00000008 01030000 00"},
		{"SA proposal length 0", PayloadSA, "00000000 01030000"},
		{"SA proposal length 7", PayloadSA, "00000007 010300"},
		{"SA proposal longer than payload", PayloadSA, "00000009 01030000"},
		{"SPI larger than proposal", PayloadSA, "0000000c 0103ff00 01020304"},
		{"SPI one octet too large", PayloadSA, "0000000c 01030500 01020304"},
		{"SPI eats into what follows", PayloadSA, "02000008 01030400 00000008 02030000"},
		{"octets behind the transforms", PayloadSA, "0000000c 01030000 01020304"},
		{"transform missing", PayloadSA, "00000008 01030001"},
		{"transform length 0", PayloadSA, "00000010 01030001 00000000 0100000c"},
		{"transform length 7", PayloadSA, "0000000f 01030001 00000007 010000"},
		{"transform beyond the proposal", PayloadSA, "00000010 01030001 0000000c 0100000c"},
		{"transform marker against count", PayloadSA, "00000010 01030001 03000008 0100000c"},
		{"fewer transforms than counted", PayloadSA, "00000010 01030002 03000008 0100000c"},
		{"attribute cut", PayloadSA, "00000011 01030001 00000009 0100000c 80"},
		{"attribute without value", PayloadSA, "00000012 01030001 0000000a 0100000c 800e"},
		{"attribute length beyond", PayloadSA, "00000014 01030001 0000000c 0100000c 000e0001"},
		{"KE short", PayloadKE, "001f00"},
		{"IDi empty", PayloadIDi, ""},
		{"IDi IPv4 of 3 octets", PayloadIDi, "01000000 010203"},
		{"IDr IPv6 of 4 octets", PayloadIDr, "05000000 01020304"},
		{"CERT empty", PayloadCERT, ""},
		{"CERTREQ empty", PayloadCERTREQ, ""},
		{"AUTH short", PayloadAUTH, "020000"},
		{"nonce of 15", PayloadNonce, strings.Repeat("00", 15)},
		{"nonce of 257", PayloadNonce, strings.Repeat("00", 257)},
		{"notify short", PayloadNotify, "000040"},
		{"notify SPI beyond", PayloadNotify, "03044009 010203"},
		{"delete short", PayloadDelete, "030400"},
		{"delete count beyond", PayloadDelete, "0304ffff 01020304"},
		{"delete count too small", PayloadDelete, "03040001 01020304 01020304"},
		{"delete ESP with SPI size 8", PayloadDelete, "03080001 0102030401020304"},
		{"delete ESP with SPI size 0", PayloadDelete, "0300ffff"},
		{"delete IKE with SPI", PayloadDelete, "01040001 01020304"},
		{"delete IKE counted", PayloadDelete, "01000001"},
		{"TS short", PayloadTSi, "010000"},
		{"TS counted but absent", PayloadTSi, "01000000"},
		{"TS left over", PayloadTSr, "00000000 00"},
		{"TS length 3", PayloadTSr, "01000000 09000003"},
		{"TS IPv4 short", PayloadTSi, "01000000 0700000f 0000ffff 01020304 010203"},
		{"TS IPv4 long", PayloadTSi, "01000000 07000011 0000ffff 01020304 01020304 00"},
		{"TS IPv6 with IPv4's length", PayloadTSi, "01000000 08000010 0000ffff 01020304 01020304"},
		{"CP short", PayloadCP, "010000"},
		{"CP attribute header cut", PayloadCP, "01000000 000100"},
		{"CP attribute beyond", PayloadCP, "01000000 00010001"},
		{"SKF short", PayloadSKF, "000100"},
		{"SKF number 0", PayloadSKF, "00000001"},
		{"SKF number above total", PayloadSKF, "00020001"},
	} {
		b, err := (&Message{Payloads: []Payload{raw{tt.typ, unhex(t, tt.body)}}}).Append(nil)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		if m, err := Parse(b); !errors.Is(err, ErrSyntax) {
			t.Errorf("%s: got %v, %v; want %v", tt.name, m, err, ErrSyntax)
		}
	}
}

func TestHeaderRefusals(t *testing.T) {
	b, err := (&Message{Payloads: []Payload{&Nonce{make([]byte, 16)}}}).Append(nil)
	if err != nil {
		t.Fatal(err)
	}
	v := bytes.Clone(b)
	v[17] = 0x10
	if _, err := Parse(v); !errors.Is(err, ErrVersion) {
		t.Errorf("major 1: got %v, want %v", err, ErrVersion)
	}
	if _, _, err := ParseHeader(v); !errors.Is(err, ErrVersion) {
		t.Errorf("major 1: got %v, want %v", err, ErrVersion)
	}
	v[17] = 0x21 // a higher minor version is read as 2.0 (RFC 7296, 2.5)
	if m, err := Parse(v); err != nil || m.Minor != 1 {
		t.Errorf("minor 1: got %v, %v", m, err)
	}
	// SK that is not the last payload.
	m := &Message{Payloads: []Payload{&Encrypted{First: PayloadNone, Body: make([]byte, 40)}, &Nonce{make([]byte, 16)}}}
	if b, err = m.Append(nil); err != nil {
		t.Fatal(err)
	}
	if _, err := Parse(b); !errors.Is(err, ErrEncrypted) {
		t.Errorf("SK not last: got %v, want %v", err, ErrEncrypted)
	}
}

func TestEncryptedHostile(t *testing.T) {
	c, err := newGCM(make([]byte, 36))
	if err != nil {
		t.Fatal(err)
	}
	for n := range 8 + 1 + 16 {
		b, err := (&Message{Payloads: []Payload{&Encrypted{Body: make([]byte, n)}}}).Append(nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Open(b, c); !errors.Is(err, ErrIntegrity) {
			t.Errorf("%d octets: got %v, want %v", n, err, ErrIntegrity)
		}
	}
	// What the peer itself sealed badly is another error than a forgery.
	for _, tt := range []struct {
		name  string
		first PayloadType
		plain []byte
		want  error
	}{
		{"pad length beyond", PayloadNone, []byte{1}, ErrSyntax},
		{"chain cut", PayloadNonce, []byte{0, 0, 0, 0}, ErrSyntax},
		{"SK in SK", PayloadSK, []byte{0, 0, 0, 4, 0}, ErrEncrypted},
		{"octets left over", PayloadNone, []byte{1, 0}, ErrSyntax},
	} {
		m := &Message{}
		b := m.appendHeader(nil, PayloadSK)
		b = append(b, uint8(tt.first), 0, 0, uint8(4+8+len(tt.plain)+16))
		off := len(b)
		b = append(append(append(b, make([]byte, 8)...), tt.plain...), make([]byte, 16)...)
		if err := isakmp.Finish(b); err != nil {
			t.Fatal(err)
		}
		if err := c.Seal(b[:off], b[off:]); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(b, c); !errors.Is(err, tt.want) || errors.Is(err, ErrIntegrity) {
			t.Errorf("%s: got %v, want %v", tt.name, err, tt.want)
		}
	}
}

func TestAppendRefuses(t *testing.T) {
	a4 := netip.MustParseAddr("192.0.2.1")
	for _, p := range []Payload{
		&SA{[]Proposal{{SPI: make([]byte, 256)}}},
		&SA{[]Proposal{{Transforms: make([]Transform, 256)}}},
		&SA{[]Proposal{{Transforms: []Transform{{Attributes: []Attribute{{Short: true, Value: []byte{1}}}}}}}},
		&SA{[]Proposal{{Transforms: []Transform{{Attributes: []Attribute{{Type: 0x8000}}}}}}},
		&SA{[]Proposal{{Transforms: []Transform{{Attributes: []Attribute{{Value: make([]byte, 65530)}}}}}}},
		&Nonce{}, &Notify{SPI: make([]byte, 256)},
		&Delete{Protocol: ProtocolIKE, SPIs: []uint32{1}},
		&TSi{make([]TrafficSelector, 256)},
		&TSr{[]TrafficSelector{{Type: TSIPv6Range, Start: a4, End: a4}}},
		&TSr{[]TrafficSelector{{Type: TSIPv4Range}}},
		&Config{Attributes: []ConfigAttribute{{Type: 0x8000}}},
	} {
		if _, err := p.Append(nil); !errors.Is(err, ErrValue) {
			t.Errorf("%T %+v: got %v, want %v", p, p, err, ErrValue)
		}
	}
}

func TestStrings(t *testing.T) {
	for _, tt := range []struct{ got, want string }{
		{NO_PROPOSAL_CHOSEN.String(), "NO_PROPOSAL_CHOSEN"},
		{NotifyType(40999).String(), "NotifyType(40999)"},
		{PayloadType(200).String(), "PayloadType(200)"},
		{KEID(31).String(), "CURVE25519"},
		{NewTransform(TransformENCR, EncrAES_CBC, 256).String(), "AES_CBC-256"},
		{NewTransform(TransformADDKE1, KEML_KEM_768, 0).String(), "ADDKE1:ML_KEM_768"},
		{Proposal{Protocol: ProtocolESP, Transforms: []Transform{NewTransform(TransformENCR, EncrAES_GCM_16, 128),
			NewTransform(TransformESN, ESNNo, 0)}}.String(), "ESP:AES_GCM_16-128/NO_ESN"},
		{ID{Type: IDIPv4Addr, Data: []byte{10, 0, 0, 1}}.String(), "10.0.0.1"},
		{ID{Type: IDFQDN, Data: []byte("a\nb")}.String(), `a\nb`},
		{ID{Type: IDKeyID, Data: []byte{1}}.String(), "ID_KEY_ID:01"},
		{TrafficSelector{Type: TSSecLabel, Raw: []byte{1}}.String(), "TS_SECLABEL:01"},
		{TrafficSelector{}.String(), "TSType(0):"},
	} {
		if tt.got != tt.want {
			t.Errorf("got %q, want %q", tt.got, tt.want)
		}
	}
	if !TS_MAX_QUEUE.IsError() || COOKIE.IsError() {
		t.Error("IsError: wrong side of 16384")
	}
}

func TestKeyBits(t *testing.T) {
	kl := Attribute{Type: AttributeKeyLength, Short: true, Value: []byte{1, 0}}
	for _, tt := range []struct {
		attrs []Attribute
		bits  int
		ok    bool
	}{
		{nil, 0, true},
		{[]Attribute{kl}, 256, true},
		{[]Attribute{kl, kl}, 0, false},
		{[]Attribute{{Type: 15, Short: true, Value: []byte{1, 0}}}, 0, false},
		{[]Attribute{{Type: AttributeKeyLength, Value: []byte{1, 0}}}, 0, false},
	} {
		if bits, ok := (Transform{Attributes: tt.attrs}).KeyBits(); bits != tt.bits || ok != tt.ok {
			t.Errorf("%v: got %d, %v; want %d, %v", tt.attrs, bits, ok, tt.bits, tt.ok)
		}
	}
	if !NewTransform(TransformENCR, EncrAES_CBC, 256).Equal(Transform{Type: TransformENCR, ID: 12, Attributes: []Attribute{kl}}) {
		t.Error("equal transforms differ")
	}
}

func FuzzParse(f *testing.F) {
	for _, m := range wireMessages(f) {
		f.Add(m)
	}
	b, err := full().Append(nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := Parse(b)
		if err != nil {
			return
		}
		for _, p := range m.Payloads {
			if sa, ok := p.(*SA); ok {
				for _, pr := range sa.Proposals {
					_ = pr.String()
				}
			}
		}
		out, err := m.Append(nil)
		if err != nil {
			t.Fatalf("parsed, but does not encode: %v", err)
		}
		again, err := Parse(out)
		if err != nil {
			t.Fatalf("does not parse again: %v", err)
		}
		if !reflect.DeepEqual(m, again) {
			t.Errorf("got %+v, want %+v", again, m)
		}
	})
}

// FuzzOpen lets the fuzzer write the plaintext of a peer that holds the keys.
func FuzzOpen(f *testing.F) {
	f.Add(uint8(PayloadNonce), append(make([]byte, 4+16), 0))
	f.Add(uint8(PayloadNone), []byte{0})
	f.Fuzz(func(t *testing.T, first uint8, plain []byte) {
		if len(plain) > 60000 {
			return
		}
		c, err := newGCM(make([]byte, 36))
		if err != nil {
			t.Fatal(err)
		}
		b := (&Message{}).appendHeader(nil, PayloadSK)
		n := 4 + 8 + len(plain) + 16
		b = append(b, first, 0, uint8(n>>8), uint8(n))
		off := len(b)
		b = append(append(append(b, make([]byte, 8)...), plain...), make([]byte, 16)...)
		if err := isakmp.Finish(b); err != nil {
			t.Fatal(err)
		}
		if err := c.Seal(b[:off], b[off:]); err != nil {
			t.Fatal(err)
		}
		m, err := Open(b, c)
		if errors.Is(err, ErrIntegrity) && len(plain) > 0 {
			t.Fatalf("sealed here, yet %v", err)
		}
		if err != nil {
			return
		}
		out, err := m.AppendSealed(nil, c)
		if err != nil {
			t.Fatal(err)
		}
		again, err := Open(out, c)
		if err != nil || !reflect.DeepEqual(again, m) {
			t.Errorf("got %+v, %v; want %+v", again, err, m)
		}
	})
}
