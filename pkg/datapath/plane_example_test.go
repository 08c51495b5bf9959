package datapath_test

import (
	"bytes"
	"fmt"
	"net/netip"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/datapath"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/ipsec"
)

// A program that forwards packets itself protects what goes from 10.1.0.0/16 to
// 10.2.0.0/16 by a tunnel between 192.0.2.1 and 192.0.2.2. Both ends are here;
// the policies and keys are set by hand instead of through package keyengine.
func ExamplePlane() {
	left, right := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	now := time.Unix(1_000_000_000, 0)

	// end makes the end of the tunnel at an address: the policy of a direction, and the SA.
	end := func(local netip.Addr, dir ipsec.Direction) *datapath.Plane {
		policies, sas := spd.NewDB(), sad.NewDB()
		e := policies.Edit()
		if _, err := e.Add(&ipsec.Policy{
			Dir: dir, Action: ipsec.Protect,
			Sel:      ipsec.Selector{Src: netip.MustParsePrefix("10.1.0.0/16"), Dst: netip.MustParsePrefix("10.2.0.0/16")},
			Requests: []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Tunnel, Src: left, Dst: right}},
		}, now); err != nil {
			panic(err)
		}
		if err := e.Commit(); err != nil {
			panic(err)
		}
		sa, err := sad.New(&ipsec.SAParams{
			SAID: ipsec.SAID{Proto: ipsec.ESP, Dst: right, SPI: 0x1234}, Src: left, Mode: ipsec.Tunnel,
			Encr: alg.EncrAESGCM16, EncrKey: ipsec.NewKey(bytes.Repeat([]byte{7}, 16+4)), ReplayWindow: 64,
		}, now)
		if err != nil {
			panic(err)
		}
		sas.Insert(sa)
		p, err := datapath.NewPlane(datapath.PlaneConfig{
			SAD: sas, SPD: policies, Default: ipsec.Discard, Flows: 1024,
			IsLocal: func(a netip.Addr) bool { return a == local },
			PathMTU: func(netip.Addr) int { return 1500 },
		})
		if err != nil {
			panic(err)
		}
		return p
	}
	out, in := end(left, ipsec.Out), end(right, ipsec.In)

	// A packet of 60 octets, with room for what is put around it.
	buf := make([]byte, 2048)
	p := datapath.Packet{Buf: buf, Off: datapath.Headroom, Len: 60}
	packet.PutHeader(p.Bytes(), netip.MustParseAddr("10.1.0.5"), netip.MustParseAddr("10.2.0.6"), 47, p.Len, 64)
	packet.FixIPv4Checksum(p.Bytes())
	clear := bytes.Clone(p.Bytes())

	r := out.Apply(p, now)
	fmt.Println("apply:", r.Verdict, r.Packets[0].Len, "octets")

	sealed := bytes.Clone(r.Packets[0].Bytes())
	r = in.Permit(datapath.Packet{Buf: sealed, Len: len(sealed)}, now)
	fmt.Println("permit:", r.Verdict, bytes.Equal(r.Packets[0].Bytes(), clear))

	// The clear packet may not come without its protection.
	r = in.Permit(datapath.Packet{Buf: clear, Len: len(clear)}, now)
	fmt.Println("permit:", r.Verdict, r.Reason)

	// Output:
	// apply: protected 116 octets
	// permit: protected true
	// permit: dropped drop_in_clear
}
