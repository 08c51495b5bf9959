package pfkey

import (
	"bytes"
	"errors"
	"reflect"
	"syscall"
	"testing"
)

// raw builds a message from a header and extensions made by ext.
func raw(typ MsgType, exts ...[]byte) []byte {
	b := Header{Type: typ, SAType: SATypeESP, Seq: 1, Pid: 2}.Append(nil)
	for _, e := range exts {
		b = append(b, e...)
	}
	host.PutUint16(b[4:], uint16(len(b)/wordLen))
	return b
}

// ext builds an extension whose length field says words, with body behind the
// first 4 octets.
func ext(words int, t ExtType, body ...byte) []byte {
	b := host.AppendUint16(nil, uint16(words))
	b = host.AppendUint16(b, uint16(t))
	b = append(b, body...)
	for len(b)%wordLen != 0 {
		b = append(b, 0)
	}
	return b
}

func zeros(n int) []byte { return make([]byte, n) }

func u16(v uint16) []byte { return host.AppendUint16(nil, v) }

func cat(l ...[]byte) []byte {
	var b []byte
	for _, x := range l {
		b = append(b, x...)
	}
	return b
}

func policyExt(reqs ...[]byte) []byte {
	body := cat(append([][]byte{u16(2), {2, 0}, zeros(8)}, reqs...)...)
	return ext((4+len(body)+7)/8, ExtXPolicy, body...)
}

func TestDecodeRefuses(t *testing.T) {
	head := func(f func(b []byte)) []byte { b := raw(Get); f(b); return b }
	sa := ext(2, ExtSA, zeros(12)...)
	v4 := cat(u16(2), zeros(14))
	v6 := cat(u16(10), zeros(26))
	for _, tt := range []struct {
		name string
		in   []byte
		want syscall.Errno
	}{
		{"empty", nil, syscall.EMSGSIZE},
		{"15 octets", raw(Get)[:15], syscall.EMSGSIZE},
		{"version 1", head(func(b []byte) { b[0] = 1 }), syscall.EINVAL},
		{"type 0", head(func(b []byte) { b[1] = 0 }), syscall.EINVAL},
		{"type 25", head(func(b []byte) { b[1] = 25 }), syscall.EINVAL},
		{"type 255", head(func(b []byte) { b[1] = 255 }), syscall.EINVAL},
		{"length 0", head(func(b []byte) { b[4], b[5] = 0, 0 }), syscall.EMSGSIZE},
		{"length 1", head(func(b []byte) { host.PutUint16(b[4:], 1) }), syscall.EMSGSIZE},
		{"length 3", head(func(b []byte) { host.PutUint16(b[4:], 3) }), syscall.EMSGSIZE},
		{"length 65535", head(func(b []byte) { host.PutUint16(b[4:], 65535) }), syscall.EMSGSIZE},
		{"17 octets", append(raw(Get), 0), syscall.EMSGSIZE},
		{"extension of length 0", raw(Get, ext(0, ExtSA, zeros(12)...)), syscall.EINVAL},
		{"extension past the end", raw(Get, ext(3, ExtSA, zeros(12)...)), syscall.EINVAL},
		{"extension of 65535 words", raw(Get, ext(65535, ExtSA, zeros(12)...)), syscall.EINVAL},
		{"extension of type 0", raw(Get, ext(2, 0, zeros(12)...)), syscall.EINVAL},
		{"unknown extension past the end", raw(Get, ext(3, 999, zeros(12)...)), syscall.EINVAL},
		{"short SA", raw(Get, ext(1, ExtSA)), syscall.EINVAL},
		{"SA twice", raw(Get, sa, sa), syscall.EINVAL},
		{"short lifetime", raw(Get, ext(3, ExtLifetimeHard, zeros(20)...)), syscall.EINVAL},
		{"address without sockaddr", raw(Get, ext(1, ExtAddressSrc)), syscall.EINVAL},
		{"address of family 1", raw(Get, ext(3, ExtAddressSrc, cat(zeros(4), u16(1), zeros(14))...)), syscall.EINVAL},
		{"IPv4 in 2 words", raw(Get, ext(2, ExtAddressSrc, cat(zeros(4), v4[:8])...)), syscall.EINVAL},
		{"IPv4 in 4 words", raw(Get, ext(4, ExtAddressSrc, cat(zeros(4), v4, zeros(8))...)), syscall.EINVAL},
		{"IPv6 in 3 words", raw(Get, ext(3, ExtAddressSrc, cat(zeros(4), v6[:16])...)), syscall.EINVAL},
		{"IPv6 in 6 words", raw(Get, ext(6, ExtAddressSrc, cat(zeros(4), v6, zeros(12))...)), syscall.EINVAL},
		{"IPv4 prefix 33", raw(Get, ext(3, ExtAddressSrc, cat([]byte{0, 33, 0, 0}, v4)...)), syscall.EINVAL},
		{"IPv6 prefix 129", raw(Get, ext(5, ExtAddressSrc, cat([]byte{0, 129, 0, 0}, v6)...)), syscall.EINVAL},
		{"key of 65 bits in 8 octets", raw(Add, ext(2, ExtKeyAuth, cat(u16(65), zeros(10))...)), syscall.EINVAL},
		{"key of 65535 bits", raw(Add, ext(2, ExtKeyEncrypt, cat(u16(65535), zeros(10))...)), syscall.EINVAL},
		{"sensitivity bitmaps", raw(Add, ext(2, ExtSensitivity, cat(zeros(5), []byte{255, 0, 255}, zeros(4))...)), syscall.EINVAL},
		{"half a combination", raw(Add, ext(2, ExtProposal, zeros(12)...)), syscall.EINVAL},
		{"short policy", raw(XSPDAdd, ext(1, ExtXPolicy)), syscall.EINVAL},
		{"request of 0 octets", raw(XSPDAdd, policyExt(zeros(16))), syscall.EINVAL},
		{"request of 15 octets", raw(XSPDAdd, policyExt(u16(15), zeros(14))), syscall.EINVAL},
		{"request past the end", raw(XSPDAdd, policyExt(u16(24), zeros(14))), syscall.EINVAL},
		{"request of 65535 octets", raw(XSPDAdd, policyExt(u16(65535), zeros(14))), syscall.EINVAL},
		{"tunnel without addresses", raw(XSPDAdd, policyExt(u16(16), u16(50), []byte{2, 3}, zeros(10))), syscall.EINVAL},
		{"tunnel with one address", raw(XSPDAdd, policyExt(u16(32), u16(50), []byte{2, 3}, zeros(10), v4)), syscall.EINVAL},
		{"tunnel of two families", raw(XSPDAdd, policyExt(u16(60), u16(50), []byte{2, 3}, zeros(10), v4, v6)), syscall.EINVAL},
		{"security context too long", raw(Add, ext(1, ExtXSecCtx, cat(zeros(2), u16(1))...)), syscall.EINVAL},
		{"security context too short", raw(Add, ext(3, ExtXSecCtx, cat(zeros(2), u16(8), zeros(16))...)), syscall.EINVAL},
		{"security context of 65535", raw(Add, ext(1, ExtXSecCtx, cat(zeros(2), u16(65535))...)), syscall.EINVAL},
		{"KMADDRESS of one", raw(XMigrate, ext(3, ExtXKMAddress, cat(zeros(4), v4)...)), syscall.EINVAL},
		{"KMADDRESS of two families", raw(XMigrate, ext(7, ExtXKMAddress, cat(zeros(4), v4, v6)...)), syscall.EINVAL},
		{"filter prefix 129", raw(Dump, ext(5, ExtXFilter, cat(zeros(34), []byte{129, 0})...)), syscall.EINVAL},
		{"short filter", raw(Dump, ext(1, ExtXFilter)), syscall.EINVAL},
		{"selectors past the end", raw(Add, ext(1, ExtXTSSrc, u16(1)...)), syscall.EINVAL},
		{"selectors of no family", raw(Add, ext(6, ExtXTSSrc, cat(u16(1), zeros(42))...)), syscall.EINVAL},
		{"flow of version 5", raw(Acquire, ext(6, ExtXFlow, cat([]byte{6, 5}, zeros(42))...)), syscall.EINVAL},
		{"blob past the end", raw(XStatus, ext(2, ExtXBlob, cat(zeros(8), []byte{255, 255, 255, 255})...)), syscall.EINVAL},
	} {
		m, err := Decode(tt.in)
		if !errors.Is(err, tt.want) {
			t.Errorf("%s: got %v, %v, want %v", tt.name, m, err, tt.want)
		}
		var pe *Error
		if err != nil && !errors.As(err, &pe) {
			t.Errorf("%s: got error of type %T", tt.name, err)
		}
	}
}

func TestDecodeAccepts(t *testing.T) {
	sa := ext(2, ExtSA, zeros(12)...)
	v4 := cat(u16(2), zeros(14))
	for _, tt := range []struct {
		name string
		in   []byte
		want func(m *Message) bool
	}{
		{"unknown extensions, twice", raw(Get, ext(1, 27), sa, ext(2, 0x7fff, zeros(12)...), ext(1, 27)),
			func(m *Message) bool { return m.SA != nil }},
		{"longer SA", raw(Get, ext(3, ExtSA, zeros(20)...)), func(m *Message) bool { return m.SA != nil }},
		{"key of 0 bits", raw(Add, ext(1, ExtKeyEncrypt)), func(m *Message) bool { return m.EncrKey.Bits == 0 }},
		{"15 stray octets after requests", raw(XSPDAdd, policyExt(u16(16), u16(50), []byte{1, 2}, zeros(10), zeros(8))),
			func(m *Message) bool { return len(m.Policy.Requests) == 1 }},
		{"addresses in transport mode", raw(XSPDAdd, policyExt(u16(48), u16(50), []byte{1, 2}, zeros(10), v4, v4)),
			func(m *Message) bool { return m.Policy.Requests[0].Src.Is4() }},
		{"nonsense in transport mode", raw(XSPDAdd, policyExt(u16(24), u16(50), []byte{1, 2}, zeros(10), zeros(8))),
			func(m *Message) bool { return !m.Policy.Requests[0].Src.IsValid() }},
		{"requests of a policy that needs none", raw(XSPDAdd, ext(3, ExtXPolicy, cat(u16(0), []byte{1}, zeros(17))...)),
			func(m *Message) bool { return len(m.Policy.Requests) == 0 }},
		{"identity without a name", raw(Add, ext(2, ExtIdentitySrc, zeros(12)...)),
			func(m *Message) bool { return m.IdentSrc.Name == "" }},
		{"identity without zero octet", raw(Add, ext(3, ExtIdentitySrc, cat(zeros(12), []byte("abcdefgh"))...)),
			func(m *Message) bool { return m.IdentSrc.Name == "abcdefgh" }},
		{"reserved field", func() []byte { b := raw(Get); b[6] = 1; return b }(),
			func(m *Message) bool { return m.Reserved != 0 }},
	} {
		m, err := Decode(tt.in)
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
		} else if !tt.want(m) {
			t.Errorf("%s: got %v", tt.name, m)
		}
	}
}

func TestAppendRefuses(t *testing.T) {
	for _, tt := range []struct {
		name string
		m    Message
		want syscall.Errno
	}{
		{"no address", Message{Src: &Address{}}, syscall.EINVAL},
		{"prefix", Message{Src: &Address{PrefixLen: 33, Addr: ap("10.0.0.1:0")}}, syscall.EINVAL},
		{"key length", Message{AuthKey: &Key{Bits: 9, Key: zeros(1)}}, syscall.EINVAL},
		{"requests of discard", Message{Policy: &Policy{Requests: make([]Request, 1)}}, syscall.EINVAL},
		{"one tunnel address", Message{Policy: &Policy{Type: PolicyIPsec, Requests: []Request{{Src: ap("10.0.0.1:0").Addr()}}}}, syscall.EINVAL},
		{"identity with zero", Message{IdentSrc: &Identity{Name: "a\x00b"}}, syscall.EINVAL},
		{"context", Message{SecCtx: &SecCtx{Ctx: zeros(4097)}}, syscall.EMSGSIZE},
		{"extension", Message{Proposal: &Proposal{Combs: make([]Comb, 7282)}}, syscall.EMSGSIZE},
		{"message", Message{Proposal: &Proposal{Combs: make([]Comb, 7281)}, SA: &SA{}, SPIRange: &SPIRange{}}, syscall.EMSGSIZE},
		{"selector of two families", Message{TSSrc: &TSList{[]TS{{Start: ap("10.0.0.1:0").Addr()}}}}, syscall.EINVAL},
		{"flow without addresses", Message{Flow: &Flow{}}, syscall.EINVAL},
	} {
		b, err := tt.m.Append([]byte("front"))
		if !errors.Is(err, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.name, err, tt.want)
		}
		if string(b) != "front" {
			t.Errorf("%s: left %d octets", tt.name, len(b))
		}
	}
}

func TestPolicyCheck(t *testing.T) {
	a := ap("10.0.0.1:0").Addr()
	ok := Request{Proto: 50, Mode: ModeTransport, Level: LevelRequire}
	for _, tt := range []struct {
		name string
		p    Policy
		want error
	}{
		{"good", Policy{Type: PolicyIPsec, Dir: DirOut, Requests: []Request{ok}}, nil},
		{"type 3", Policy{Type: PolicyEntrust, Dir: DirOut}, syscall.EINVAL},
		{"dir 0", Policy{Type: PolicyDiscard}, syscall.EINVAL},
		{"dir 4", Policy{Type: PolicyDiscard, Dir: 4}, syscall.EINVAL},
		{"7 requests", Policy{Type: PolicyIPsec, Dir: DirOut, Requests: []Request{ok, ok, ok, ok, ok, ok, ok}}, syscall.ELOOP},
		{"mode 0", Policy{Type: PolicyIPsec, Dir: DirOut, Requests: []Request{{Proto: 50}}}, syscall.EINVAL},
		{"mode 4", Policy{Type: PolicyIPsec, Dir: DirOut, Requests: []Request{{Proto: 50, Mode: 4}}}, syscall.EINVAL},
		{"level 4", Policy{Type: PolicyIPsec, Dir: DirOut, Requests: []Request{{Proto: 50, Mode: 1, Level: 4}}}, syscall.EINVAL},
		{"proto 6", Policy{Type: PolicyIPsec, Dir: DirOut, Requests: []Request{{Proto: 6, Mode: 1}}}, syscall.EINVAL},
		{"bare tunnel", Policy{Type: PolicyIPsec, Dir: DirOut, Requests: []Request{{Proto: 50, Mode: 2}}}, syscall.EINVAL},
		{"use tunnel out", Policy{Type: PolicyIPsec, Dir: DirOut, Requests: []Request{{50, ModeTunnel, LevelUse, 0, a, a}}}, syscall.EINVAL},
		{"use tunnel in", Policy{Type: PolicyIPsec, Dir: DirIn, Requests: []Request{{50, ModeTunnel, LevelUse, 0, a, a}}}, nil},
	} {
		if err := tt.p.Check(); !errors.Is(err, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.name, err, tt.want)
		}
	}
}

func TestFilterMatch(t *testing.T) {
	f := Filter{[16]byte{10, 1}, [16]byte{10, 2, 3, 4}, 2, 16, 32}
	for _, tt := range []struct {
		src, dst string
		want     bool
	}{
		{"10.1.9.9:0", "10.2.3.4:0", true}, {"10.2.9.9:0", "10.2.3.4:0", false},
		{"10.1.9.9:0", "10.2.3.5:0", false}, {"[2001:db8::1]:0", "[2001:db8::2]:0", false},
	} {
		if got := f.Match(ap(tt.src).Addr(), ap(tt.dst).Addr()); got != tt.want {
			t.Errorf("%s -> %s: got %v, want %v", tt.src, tt.dst, got, tt.want)
		}
	}
	if !new(Filter).Match(ap("10.1.9.9:0").Addr(), ap("[::1]:0").Addr()) {
		t.Error("empty filter: got false, want true")
	}
}

// FuzzDecode: nothing panics; what decodes, encodes and decodes to the same.
func FuzzDecode(f *testing.F) {
	for _, typ := range []MsgType{Add, XSPDAdd, Acquire} {
		b, err := full(typ).Append(nil)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add(raw(Get, ext(2, ExtSA, zeros(12)...)))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := Decode(b); err != nil && len(b) >= lenHeader {
			// Let the fuzzer get past the length check.
			b = bytes.Clone(b[:len(b)/wordLen*wordLen])
			b[0] = Version
			host.PutUint16(b[4:], uint16(len(b)/wordLen))
		}
		m, err := Decode(b)
		if err != nil {
			return
		}
		_ = m.String()
		if m.Policy != nil {
			_ = m.Policy.Check()
		}
		b2, err := m.Append(nil)
		if err != nil {
			t.Fatalf("Append of %v: %v", m, err)
		}
		m2, err := Decode(b2)
		if err != nil {
			t.Fatalf("Decode again: %v", err)
		}
		if !reflect.DeepEqual(m, m2) {
			t.Fatalf("got %v, want %v", m2, m)
		}
	})
}
