package main

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/missiu/missiu/pkg/attach"
	"github.com/missiu/missiu/pkg/datapath/bump"
)

// record is a frame as standard input and output have it.
func record(f string) string {
	return string(binary.BigEndian.AppendUint32(nil, uint32(len(f)))) + f
}

// TestTapSide: frames go through with their lengths, in both directions; bad
// input is told, and the end of missiu.
func TestTapSide(t *testing.T) {
	attach.Dir = t.TempDir()
	defer func(d string) { attach.Dir = d }("/run/missiu")
	var got []string
	done := make(chan struct{})
	srv, err := attach.Listen(attach.Path("eth9", bump.PurposeHigh), 8, func(c *net.UnixConn) {
		b := make([]byte, bump.MaxFrame+1)
		for {
			n, err := c.Read(b)
			if err != nil {
				return
			}
			switch s := string(b[:n]); s {
			case "end":
				close(done)
				return
			default:
				got = append(got, s)
				c.Write([]byte("back " + s))
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer srv.Close()
	o := &options{ifname: "eth9"}
	var out bytes.Buffer
	err = tapSide(o, "high", strings.NewReader(record("one")+record("another")+record("end")), &out, io.Discard)
	<-done
	if err == nil || err.Error() != "eth9: missiu has ended" {
		t.Errorf("error %v", err)
	}
	if strings.Join(got, ",") != "one,another" || out.String() != record("back one")+record("back another") {
		t.Errorf("sent %q, got %q", got, out.String())
	}
	for in, want := range map[string]string{
		"\x00\x00\x00\x00":           "frame 0: length 0, want 1 to",
		record("x") + "\x00\x10\x00": "frame 1: unexpected EOF",
		"\x00\x10\x00\x00":           "frame 0: length 1048576, want 1 to",
		"\x00\x00\x00\x05four":       "frame 0: unexpected EOF",
	} {
		if err := tapSide(o, "high", strings.NewReader(in), io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("input %q: %v, want %q", in, err, want)
		}
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	if err := tapSide(o, "high", strings.NewReader(record("one")), w, io.Discard); err == nil || !strings.Contains(err.Error(), "output: ") {
		t.Errorf("closed output: %v", err)
	}
	if err := tapSide(o, "low", strings.NewReader(""), io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), "no missiu is running") {
		t.Errorf("no socket: %v", err)
	}
}
