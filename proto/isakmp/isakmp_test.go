package isakmp

import (
	"bytes"
	"encoding/hex"
	"errors"
	"testing"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestHeader(t *testing.T) {
	// An IKE_SA_INIT request with one Nonce payload of 16 octets.
	b := unhex(t, "a945c631d605f74f"+"0000000000000000"+"28"+"20"+"22"+"08"+"00000000"+"00000030"+
		"00000014"+"000102030405060708090a0b0c0d0e0f")
	h, body, err := Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	want := Header{InitiatorSPI: 0xa945c631d605f74f, NextPayload: 40, Major: 2, Exchange: 34, Flags: 8}
	if h != want {
		t.Errorf("got %+v, want %+v", h, want)
	}
	out := append(h.Append(nil), body...)
	if err := Finish(out); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out, b) {
		t.Errorf("got %x, want %x", out, b)
	}
	for n := range b {
		if _, _, err := Parse(b[:n]); err == nil {
			t.Errorf("%d of %d octets parse", n, len(b))
		}
	}
	if _, _, err := Parse(append(b, 0)); !errors.Is(err, ErrLength) {
		t.Errorf("trailing octet: got %v, want %v", err, ErrLength)
	}
	if got, want := h.InitiatorSPI.String(), "a945c631d605f74f"; got != want {
		t.Errorf("SPI: got %q, want %q", got, want)
	}
}

func TestWalk(t *testing.T) {
	for _, tt := range []struct {
		name, in string
		first    uint8
		want     []uint8
		err      error
	}{
		{"empty chain", "", 0, nil, nil},
		{"octets without payload", "00", 0, nil, ErrTrailing},
		{"one", "00000004", 40, []uint8{40}, nil},
		{"two", "290000050000000006aabb", 40, []uint8{40, 41}, nil},
		{"critical", "00800004", 99, []uint8{99}, nil},
		{"length 3", "00000003", 40, nil, ErrLength},
		{"length 0", "00000000", 40, nil, ErrLength},
		{"beyond the end", "00000005", 40, nil, ErrLength},
		{"short header", "000000", 40, nil, ErrLength},
		{"next without octets", "29000004", 40, []uint8{40}, ErrLength},
		{"trailing", "0000000400", 40, []uint8{40}, ErrTrailing},
	} {
		var got []uint8
		_, err := Walk(tt.first, unhex(t, tt.in), func(p Payload) bool { got = append(got, p.Type); return true })
		if !errors.Is(err, tt.err) || !bytes.Equal(got, tt.want) {
			t.Errorf("%s: got %v, %v; want %v, %v", tt.name, got, err, tt.want, tt.err)
		}
	}
	rest, err := Walk(40, unhex(t, "29000004"+"00000004"), func(Payload) bool { return false })
	if err != nil || len(rest) != 4 {
		t.Errorf("stopped walk: got %x, %v; want the second payload", rest, err)
	}
}

func TestTooLong(t *testing.T) {
	if err := Finish(make([]byte, MaxLen+1)); !errors.Is(err, ErrLength) {
		t.Errorf("message: got %v, want %v", err, ErrLength)
	}
	if err := Finish(nil); !errors.Is(err, ErrShort) {
		t.Errorf("no header: got %v, want %v", err, ErrShort)
	}
	_, err := AppendPayload(nil, 0, 0, func(b []byte) ([]byte, error) { return append(b, make([]byte, 0xfffc)...), nil })
	if !errors.Is(err, ErrLength) {
		t.Errorf("payload: got %v, want %v", err, ErrLength)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(unhex(f, "a945c631d605f74f000000000000000028202208000000000000003000000014000102030405060708090a0b0c0d0e0f"))
	f.Add(unhex(f, "a945c631d605f74f000000000000000028102208000000000000002429000004000000040000"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, body, err := Parse(b)
		if err != nil {
			return
		}
		out := h.Append(nil)
		var again []byte
		_, err = Walk(h.NextPayload, body, func(p Payload) bool {
			again, _ = AppendPayload(again, p.Next, p.Flags, func(b []byte) ([]byte, error) { return append(b, p.Body...), nil })
			return true
		})
		if err != nil {
			return
		}
		out = append(out, again...)
		if err := Finish(out); err != nil || !bytes.Equal(out, b) {
			t.Errorf("got %x, %v; want %x", out, err, b)
		}
	})
}
