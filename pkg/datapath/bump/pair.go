package bump

import (
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/tap"
)

// The helper pair of an interface: what is sent on KX arrives at KU.
//
//	NIC  --rx, fwd--> KX ==> KU --AF_PACKET--> process     frames from the NIC
//	stack --tx, fwd--> KX ==> KU --AF_PACKET--> process    frames from the kernel
//	NIC  <--mirred-- KX <== KU <--AF_PACKET-- process      frames for the kernel
//	NIC  <--AF_PACKET-- process                            frames for the NIC
//
// KX has the MAC of the interface, or unicast frames that come over it would be
// "other host" to the stack, which drops them silently. What it hands over
// unfinished is ours to say, whatever the interface does (see offloads).

// aliasPrefix marks our devices for the operator, and keeps others from ours.
const aliasPrefix = "missiu:"

// pairNames are the names of KX and KU.
func pairNames(ifname string) (kx, ku string) {
	return hashName("mik", ifname), hashName("miu", ifname)
}

// hashName makes a name of ours for an interface of ifname's.
func hashName(prefix, ifname string) string {
	h := fnv.New32a()
	h.Write([]byte(ifname))
	return fmt.Sprintf("%s%08x", prefix, h.Sum32())
}

// bigMTU is the MTU of the pair: above every interface's, since it limits what
// may be written too.
const bigMTU = 65535

type pair struct {
	kx, ku int       // indexes
	super  tap.Super // that come over it, and that it takes
}

// openPair finds or makes the pair, and makes it what it has to be. mark is for offloads.
func openPair(h *netlink.Handle, ifname string, mac net.HardwareAddr, offload string, mark uint32) (*pair, error) {
	kxName, kuName := pairNames(ifname)
	kx, err := h.LinkByName(kxName)
	ku, err2 := h.LinkByName(kuName)
	if err != nil || err2 != nil || kx.Type() != "veth" || ku.Type() != "veth" {
		for _, l := range []netlink.Link{kx, ku} {
			if l != nil {
				h.LinkDel(l) // the other is gone with it
			}
		}
		v := netlink.NewVeth(netlink.LinkAttrs{Name: kxName, HardwareAddr: mac, MTU: bigMTU, TxQLen: 1000})
		v.PeerName, v.PeerMTU = kuName, bigMTU
		if err := h.LinkAdd(v); err != nil {
			return nil, vethError(kxName, err)
		}
		if kx, err = h.LinkByName(kxName); err != nil {
			return nil, err
		}
		if ku, err = h.LinkByName(kuName); err != nil {
			return nil, err
		}
	}
	for _, l := range []netlink.Link{kx, ku} {
		if err := prepare(h, l, ifname); err != nil {
			return nil, fmt.Errorf("%s: %w", l.Attrs().Name, err)
		}
	}
	if err := carried(h, kx, ku); err != nil {
		return nil, err
	}
	super, err := offloads(kxName, kx.Attrs().Index, offload, mark)
	if err != nil {
		return nil, err
	}
	if err := h.LinkSetHardwareAddr(kx, mac); err != nil {
		return nil, fmt.Errorf("%s: %w", kxName, err)
	}
	return &pair{kx.Attrs().Index, ku.Attrs().Index, super}, nil
}

// prepare has nothing of the host take an interest in a device.
func prepare(h *netlink.Handle, l netlink.Link, ifname string) error {
	name := l.Attrs().Name
	err := os.WriteFile(filepath.Join("/proc/sys/net/ipv6/conf", name, "disable_ipv6"), []byte("1"), 0)
	if errors.Is(err, os.ErrNotExist) {
		err = nil // the kernel has no IPv6
	}
	return errors.Join(err, h.LinkSetAlias(l, aliasPrefix+ifname), h.LinkSetARPOff(l), h.LinkSetMTU(l, bigMTU), h.LinkSetUp(l))
}

// carrierLimit is how long the kernel may take to note a new carrier.
const carrierLimit = 10 * time.Second

// carried waits until devices send: the kernel notes a new carrier some time after
// both ends are up, and drops without a word what is sent before.
func carried(h *netlink.Handle, ls ...netlink.Link) error {
	for end := time.Now().Add(carrierLimit); ; time.Sleep(time.Millisecond) {
		up := 0
		for _, l := range ls {
			now, err := h.LinkByIndex(l.Attrs().Index)
			if err != nil {
				return fmt.Errorf("%s: %w", l.Attrs().Name, err)
			}
			if now.Attrs().OperState == netlink.OperUp {
				up++
			}
		}
		if up == len(ls) {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s: no carrier within %v", ls[0].Attrs().Name, carrierLimit)
		}
	}
}

// redirect has what arrives at KX received by the interface.
func (p *pair) redirect(h *netlink.Handle, nic int) error {
	q := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: p.kx, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}}
	if err := h.QdiscAdd(q); err != nil && !errors.Is(err, unix.EEXIST) {
		return kernelLacks("NET_SCH_INGRESS", err)
	}
	f := &netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: p.kx, Parent: q.Handle, Priority: 1, Protocol: unix.ETH_P_ALL},
		Actions:     []netlink.Action{&netlink.MirredAction{ActionAttrs: netlink.ActionAttrs{Action: netlink.TC_ACT_STOLEN}, MirredAction: netlink.TCA_INGRESS_REDIR, Ifindex: nic}},
	}
	old, err := h.FilterList(mustLink(h, p.kx), q.Handle)
	if err != nil {
		return err
	}
	for _, o := range old {
		if u, ok := o.(*netlink.U32); ok && len(u.Actions) == 1 {
			if m, ok := u.Actions[0].(*netlink.MirredAction); ok && m.Ifindex == nic && m.MirredAction == netlink.TCA_INGRESS_REDIR {
				return nil
			}
		}
	}
	for _, o := range old {
		if err := h.FilterDel(o); err != nil {
			return err
		}
	}
	if err := h.FilterAdd(f); err != nil {
		return kernelLacks("NET_CLS_U32, NET_ACT_MIRRED", err)
	}
	return nil
}

// linkIfAny makes nil of a link that there is not.
func linkIfAny(l netlink.Link, err error) (netlink.Link, error) {
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return l, nil
}

func vethError(name string, err error) error {
	if errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("veth: %w (load the kernel module veth)", err)
	}
	return fmt.Errorf("%s: %w", name, err)
}

func mustLink(h *netlink.Handle, index int) netlink.Link {
	return &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index}}
}

func kernelLacks(what string, err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("the kernel lacks %s: %w", what, err)
	}
	return err
}

// removePair deletes the pair; it reports whether there was one.
func removePair(h *netlink.Handle, ifname string) (bool, error) {
	kx, _ := pairNames(ifname)
	l, err := h.LinkByName(kx)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return false, nil
	}
	if err == nil {
		err = h.LinkDel(l)
	}
	return true, err
}

// flagLRO is ETH_FLAG_LRO.
const flagLRO = 1 << 15

// lroOff switches large receive offload off, which joins packets beyond repair
// (GRO does not), and reports whether it was on.
func lroOff(ifname string) (was bool, err error) {
	flags, err := ethtoolValue(ifname, unix.ETHTOOL_GFLAGS, 0)
	if err != nil || flags&flagLRO == 0 {
		return false, nil // nothing to switch
	}
	return true, ethtool(ifname, unix.ETHTOOL_SFLAGS, flags&^flagLRO)
}

func lroOn(ifname string) error {
	flags, err := ethtoolValue(ifname, unix.ETHTOOL_GFLAGS, 0)
	if err != nil {
		return err
	}
	return ethtool(ifname, unix.ETHTOOL_SFLAGS, flags|flagLRO)
}
