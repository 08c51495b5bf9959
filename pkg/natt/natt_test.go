package natt

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/missiu/missiu/internal/nstest"
)

var (
	ike4 = Message{netip.MustParseAddrPort("192.0.2.1:4500"), netip.MustParseAddrPort("192.0.2.2:61000"), bytes.Repeat([]byte{7}, 28)}
	ike6 = Message{netip.MustParseAddrPort("[2001:db8::1]:4500"), netip.MustParseAddrPort("[2001:db8::2]:4500"), []byte{0xff}}
)

func equal(a, b Message) bool {
	return a.Local == b.Local && a.Remote == b.Remote && bytes.Equal(a.Payload, b.Payload)
}

func TestFormat(t *testing.T) {
	const want = "01040000" + "1194ee48" + "c0000201000000000000000000000000" + "c0000202000000000000000000000000"
	b, err := ike4.Append(nil)
	if err != nil || hex.EncodeToString(b[:headerLen]) != want {
		t.Fatalf("got %x, %v\nwant %s", b, err, want)
	}
	for _, m := range []Message{ike4, ike6} {
		b, err := m.Append(nil)
		if err != nil {
			t.Fatal(err)
		}
		got, err := Parse(b)
		if err != nil || !equal(got, m) {
			t.Errorf("got %+v, %v; want %+v", got, err, m)
		}
		for n := range headerLen + 1 {
			if _, err := Parse(b[:n]); err == nil {
				t.Errorf("cut to %d octets: no error", n)
			}
		}
	}
}

func TestRefused(t *testing.T) {
	for _, tt := range []struct {
		name string
		at   int
		to   byte
	}{{"version", 0, 2}, {"family", 1, 5}, {"reserved", 3, 1}, {"local port 0", 4, 0}, {"behind IPv4", 20, 1}} {
		b, _ := ike4.Append(nil)
		b[tt.at] = tt.to
		if tt.at == 4 {
			b[5] = 0
		}
		_, err := Parse(b)
		var fe *FormatError
		if !errors.As(err, &fe) {
			t.Errorf("%s: got %v", tt.name, err)
		}
	}
	for name, m := range map[string]Message{
		"two families": {ike4.Local, ike6.Remote, ike4.Payload},
		"no address":   {netip.AddrPort{}, ike4.Remote, ike4.Payload},
		"short":        {ike4.Local, ike4.Remote, make([]byte, 27)},
		"long":         {ike4.Local, ike4.Remote, make([]byte, 65536)},
		"empty":        {ike4.Local, ike4.Remote, nil},
	} {
		if _, err := m.Append(nil); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, m := range []Message{ike4, ike6} {
		b, _ := m.Append(nil)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := Parse(b)
		if err != nil {
			return
		}
		again, err := m.Append(nil)
		if err != nil || !bytes.Equal(again, b) {
			t.Fatalf("%x parses and becomes %x, %v", b, again, err)
		}
	})
}

func TestServer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "eth0.natt")
	fromClient := make(chan Message, 10)
	s, err := Listen(path, func(m Message) {
		m.Payload = bytes.Clone(m.Payload)
		fromClient <- m
	})
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("socket: %v, %v", st.Mode(), err)
	}
	if _, err := Listen(path, nil); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Fatalf("second server: %v", err)
	}
	c, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	// The probe of the second server may still be the client; what the real
	// one sends shows that it has taken over.
	if err := c.Send(ike6); err != nil {
		t.Fatal(err)
	}
	if m := <-fromClient; !equal(m, ike6) {
		t.Fatalf("got %+v", m)
	}
	if !s.Deliver(ike4.Local, ike4.Remote, ike4.Payload) {
		t.Fatal("not delivered")
	}
	buf := make([]byte, MaxMessage)
	m, err := c.Receive(buf)
	if err != nil || !equal(m, ike4) {
		t.Fatalf("got %+v, %v", m, err)
	}
	// Malformed messages are counted and cost nothing else.
	if _, err := c.c.Write([]byte{1, 2, 3}); err != nil {
		t.Fatal(err)
	}
	if err := c.Send(ike4); err != nil {
		t.Fatal(err)
	}
	if m := <-fromClient; !equal(m, ike4) {
		t.Fatalf("got %+v", m)
	}
	if st := s.Stats(); st.Malformed != 1 || st.Received != 3 {
		t.Errorf("%+v", st)
	}
	nstest.Until(t, "a delivery to be counted", func() bool { return s.Stats().Delivered == 1 }) // after it
	// A client that does not read holds up nobody: Deliver returns at once.
	for range 100000 {
		if !s.Deliver(ike4.Local, ike4.Remote, make([]byte, 1000)) {
			break
		}
	}
	if s.Stats().Slow == 0 {
		t.Error("nothing dropped for a client that does not read")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	for {
		if _, err := c.Receive(buf); err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				t.Logf("ended by %v", err)
			}
			break
		}
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Error("socket still there")
	}
	if s.Deliver(ike4.Local, ike4.Remote, ike4.Payload) {
		t.Error("delivered without a client")
	}
}
