package keysock

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/pfkey"
)

func someTape(t testing.TB) []byte {
	var b []byte
	var err error
	for _, c := range []Taped{
		{Policy: ipsec.Policy{Dir: ipsec.In, Action: ipsec.Discard, Priority: 3, Sel: ipsec.Selector{Src: netip.MustParsePrefix("10.1.2.3/8"), Dst: netip.MustParsePrefix("0.0.0.0/0"), Proto: 17, DstPort: 9}}},
		{Policy: ipsec.Policy{Dir: ipsec.Out, Action: ipsec.Protect, Sel: ipsec.Selector{Src: netip.MustParsePrefix("::/0"), Dst: netip.MustParsePrefix("2001:db8::/32")}, Requests: []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Transport, Level: ipsec.LevelRequire}}}},
		{Policy: ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: netip.MustParsePrefix("10.1.2.3/8"), Dst: netip.MustParsePrefix("0.0.0.0/0"), Proto: 17, DstPort: 9}}, Removed: true},
	} {
		if b, err = AppendTaped(b, &c); err != nil {
			t.Fatal(err)
		}
	}
	if b, err = AppendTapeEnd(b); err != nil {
		t.Fatal(err)
	}
	return b
}

// FuzzReadTape: what is read makes a tape that reads the same.
func FuzzReadTape(f *testing.F) {
	b := someTape(f)
	f.Add(b)
	f.Add(b[:len(b)-1])
	f.Add(b[len(b)-pfkey.HeaderLen:])
	f.Add([]byte("["))
	f.Fuzz(func(t *testing.T, b []byte) {
		again := func(b []byte) (out []byte, n int, err error) {
			_, err = ReadTape(b, func(c *Taped) (err error) {
				n++
				out, err = AppendTaped(out, c)
				return err
			})
			if err != nil {
				return nil, 0, err
			}
			out, err = AppendTapeEnd(out)
			return out, n, err
		}
		first, n, err := again(b)
		if err != nil {
			return
		}
		second, m, err := again(first)
		if err != nil || m != n || !bytes.Equal(first, second) {
			t.Errorf("%d changes, %x\nread again: %d, %x, %v", n, first, m, second, err)
		}
	})
}
