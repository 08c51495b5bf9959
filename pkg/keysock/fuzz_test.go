package keysock

import (
	"encoding/binary"
	"reflect"
	"testing"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/pfkey"
)

// FuzzTranslate: no message that decodes makes the translation panic; what
// translates to our nouns, translates back and again to the same.
func FuzzTranslate(f *testing.F) {
	add := func(m *pfkey.Message, err error) {
		if err != nil {
			f.Fatal(err)
		}
		b, err := encode(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	m := &pfkey.Message{Header: pfkey.Header{Type: pfkey.Add}}
	add(m, putSA(m, &SAInfo{SAParams: *params(0x1000), Added: epoch}, withKeys|withCurrent|withPrivate))
	m = &pfkey.Message{Header: pfkey.Header{Type: pfkey.XSPDAdd}}
	add(m, putPolicy(m, &PolicyInfo{Policy: *policy(1), Added: epoch}, withCurrent|withPrivate))
	m = &pfkey.Message{Header: pfkey.Header{Type: pfkey.XSPDAdd}}
	add(m, putPolicy(m, &PolicyInfo{Policy: *choice()}, withPrivate))
	m = new(pfkey.Message)
	add(m, putAcquire(m, &Acquire{Seq: 1, Proto: ipsec.ESP, Src: addr("10.0.0.1"), Dst: addr("10.0.0.2"),
		Flow: &ipsec.Flow{Src: addr("::1"), Dst: addr("::2")}}, withPrivate))
	m = new(pfkey.Message)
	add(m, putExpire(m, &SAInfo{SAParams: *params(0x1000)}, true))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= pfkey.HeaderLen {
			b = append([]byte(nil), b[:len(b)/8*8]...)
			binary.NativeEndian.PutUint16(b[4:], uint16(len(b)/8))
		}
		m, err := pfkey.Decode(b)
		if err != nil {
			return
		}
		eventOf(m)
		takeGetSPI(m)
		if i, err := takeSA(m); err == nil {
			var w pfkey.Message
			if err := putSA(&w, i, withKeys|withCurrent|withPrivate); err != nil {
				t.Fatalf("putSA of %+v: %v", i, err)
			}
			j, err := takeSA(&w)
			if err != nil || i.Encr != 0 && i.Auth != 0 && !sameSA(i, j) {
				t.Fatalf("got %+v, %v, want %+v", j, err, i)
			}
		}
		if p, err := takeParams(m); err == nil {
			var w pfkey.Message
			if err := putSA(&w, &SAInfo{SAParams: *p}, withKeys|withPrivate); err != nil {
				t.Fatalf("putSA of %+v: %v", p, err)
			}
			q, err := takeParams(&w)
			if err != nil || !sameSA(&SAInfo{SAParams: *p}, &SAInfo{SAParams: *q}) {
				t.Fatalf("got %+v, %v, want %+v", q, err, p)
			}
		}
		if p, err := takePolicy(m); err == nil {
			var w pfkey.Message
			if err := putPolicy(&w, p, withCurrent|withPrivate); err != nil {
				t.Fatalf("putPolicy of %+v: %v", p, err)
			}
			q, err := takePolicy(&w)
			if err != nil || !reflect.DeepEqual(p, q) {
				t.Fatalf("got %+v, %v, want %+v", q, err, p)
			}
		}
		if a, err := takeAcquire(m); err == nil && a.Proto != 0 {
			var w pfkey.Message
			if err := putAcquire(&w, &a, withPrivate); err != nil {
				t.Fatalf("putAcquire of %+v: %v", a, err)
			}
			c, err := takeAcquire(&w)
			if err != nil || !reflect.DeepEqual(a, c) {
				t.Fatalf("got %+v, %v, want %+v", c, err, a)
			}
		}
	})
}
