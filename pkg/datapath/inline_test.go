package datapath

import (
	"encoding/hex"
	"testing"

	"github.com/missiu/missiu/pkg/datapath/tap"
)

const macs = "020000000001020000000002"

func TestParseLink(t *testing.T) {
	for _, tt := range []struct {
		frame string
		n     int
		etype uint16
	}{
		{macs + "0800", 14, 0x0800},
		{macs + "0806", 14, 0x0806},
		{macs + "81000064" + "86dd", 18, 0x86dd},
		{macs + "88a80064" + "81000065" + "0800", 22, 0x0800},
		{macs + "8100000181000002810000038100000488b5", 30, 0x88b5},
		{macs + "810000018100000281000003810000048100000508" + "00", 0, 0}, // five
		{macs + "8100" + "0064", 0, 0},                                     // cut behind the tag
		{macs + "08", 0, 0},
		{"", 0, 0},
	} {
		b, err := hex.DecodeString(tt.frame)
		if err != nil {
			t.Fatal(err)
		}
		if n, etype := parseLink(b); n != tt.n || n != 0 && etype != tt.etype {
			t.Errorf("%s: %d octets, type %#04x; want %d, %#04x", tt.frame, n, etype, tt.n, tt.etype)
		}
	}
}

func FuzzParseLink(f *testing.F) {
	for _, s := range []string{macs + "0800", macs + "8100006486dd", macs + "88a80064"} {
		b, _ := hex.DecodeString(s)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		n, etype := parseLink(b)
		if n == 0 {
			return
		}
		if n < etherLen || n > maxLink || n > len(b) || tap.IsTag(etype) {
			t.Fatalf("%d octets of %d, type %#04x", n, len(b), etype)
		}
		// An answer to the frame goes where it came from, with its tags.
		var l linkHeader
		l.set(b[:n])
		out := make([]byte, maxLink+1)
		at := l.putReply(out, maxLink, 4)
		if string(out[at:at+6]) != string(b[6:12]) || string(out[at+6:at+12]) != string(b[:6]) || string(out[at+12:maxLink-2]) != string(b[12:n-2]) {
			t.Fatalf("answer %x to %x", out[at:maxLink], b[:n])
		}
	})
}
