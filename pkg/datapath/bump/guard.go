package bump

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"os"

	"github.com/mdlayher/netlink"
	"github.com/mdlayher/netlink/nlenc"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// guard is the second lock beside the table, of another mechanism: filters of
// traffic control (tc), which hang on the devices themselves. A renamed interface
// keeps them, and so does one whose packet filter somebody flushes, also when
// the process is dead.
//
//	NIC, clsact, in     mark IN: go on; else mirred to KX    # low Active
//	NIC, clsact, out    mark OUT: go on; else drop           # high Active
//	KU, ingress         drop                                 # either
//
// On the way in the kernel asks tc first, so the guard has to carry frames, not
// only to drop them: without the chain rx they go on to come to us, without the guard rx
// takes them. On the way out the chain tx is first, and what it lets pass bears the
// mark still; without it all else is dropped until it is back. What programs send
// past queueing disciplines (PACKET_QDISC_BYPASS) tx alone sees.
//
// The filters are classic BPF: it is the one classifier that knows marks, can
// drop by itself, and wants no right beyond CAP_NET_ADMIN.
type guard struct {
	c      *netlink.Conn
	pid    uint32 // netlink's, of c
	handle uint32 // of our filters
	marks  [2]uint32

	have [spots]filter // as we made them
	made int           // the interface whose clsact is ours; 0: none
	on   [2]int        // what has been given its discipline: the interface, KU
}

// filter is what is at a spot.
type filter struct {
	device int
	to     int // KX's index; 0: it drops
	mark   uint32
}

// Spots of filters. The first two are numbered as the sides that they keep.
const (
	spotOut = int(High)
	spotIn  = int(Low)
	spotKU  = 2
	spots   = 3
)

// parents of the filters, by spot (linux/pkt_sched.h).
var parents = [spots]uint32{spotOut: 0xfffffff3, spotIn: 0xfffffff2, spotKU: ingressHandle}

const (
	ingressHandle = 0xffff0000
	ingressParent = 0xfffffff1 // of clsact too
)

// guardPrefix begins the handles of the guards of all instances.
const guardPrefix = 0x6d690000

// guardHandle is that of the filters of an instance.
func guardHandle(ifname string) uint32 {
	h := fnv.New32a()
	h.Write([]byte(ifname))
	return guardPrefix | h.Sum32()&0xffff
}

// ErrNoGuard: there is only one lock, the chains, since the other cannot be had.
var ErrNoGuard = errors.New("no second lock by tc beside the rules of the packet filter")

// openGuard opens one in a network namespace; 0: in that of the caller.
func openGuard(ifname string, in, out uint32, netns int) (*guard, error) {
	c, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{NetNS: netns})
	if err != nil {
		return nil, err
	}
	g := &guard{c: c, handle: guardHandle(ifname), marks: [2]uint32{spotOut: out, spotIn: in}}
	if g.pid, err = portID(c); err != nil {
		c.Close()
		return nil, err
	}
	return g, nil
}

// tcmsg is struct tcmsg.
func tcmsg(device int, handle, parent, info uint32) []byte {
	b := make([]byte, 20)
	binary.NativeEndian.PutUint32(b[4:], uint32(device))
	binary.NativeEndian.PutUint32(b[8:], handle)
	binary.NativeEndian.PutUint32(b[12:], parent)
	binary.NativeEndian.PutUint32(b[16:], info)
	return b
}

// request sends one, and waits for the kernel's answer. attrs may be nil.
func (g *guard) request(kind int, flags netlink.HeaderFlags, msg []byte, attrs func(*netlink.AttributeEncoder)) error {
	if attrs != nil {
		e := netlink.NewAttributeEncoder()
		attrs(e)
		b, err := e.Encode()
		if err != nil {
			return err
		}
		msg = append(msg, b...)
	}
	_, err := g.c.Execute(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(kind), Flags: netlink.Request | netlink.Acknowledge | flags},
		Data:   msg,
	})
	return err
}

// entry is a queueing discipline or a filter, as a dump tells.
type entry struct {
	handle, parent, info uint32
	kind                 string
}

// dump lists those of a device; filters those with a parent.
func (g *guard) dump(kind, device int, parent uint32) (es []entry, err error) {
	msgs, err := g.c.Execute(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(kind), Flags: netlink.Request | netlink.Dump},
		Data:   tcmsg(device, 0, parent, 0),
	})
	if err != nil {
		return nil, err
	}
	for _, m := range msgs {
		if len(m.Data) < 20 || int(int32(nlenc.Uint32(m.Data[4:8]))) != device {
			continue
		}
		e := entry{handle: nlenc.Uint32(m.Data[8:12]), parent: nlenc.Uint32(m.Data[12:16]), info: nlenc.Uint32(m.Data[16:20])}
		ad, err := netlink.NewAttributeDecoder(m.Data[20:])
		if err != nil {
			return nil, err
		}
		for ad.Next() {
			if ad.Type() == unix.TCA_KIND {
				e.kind = ad.String()
			}
		}
		es = append(es, e)
	}
	return es, nil
}

// qdisc is the kind of what holds filters for what comes in; "": none.
func (g *guard) qdisc(device int) (string, error) {
	es, err := g.dump(unix.RTM_GETQDISC, device, 0)
	for _, e := range es {
		if e.parent == ingressParent {
			return e.kind, nil
		}
	}
	return "", err
}

// prepare finds out whether the guard can be at an interface, and whether its
// clsact will be ours. It changes nothing.
func (g *guard) prepare(nic int) error {
	kind, err := g.qdisc(nic)
	switch {
	case err != nil:
		return err
	case kind == "ingress": // it has no place for what leaves
		return fmt.Errorf("%w: the interface has a queueing discipline %q in the place of a clsact", ErrNoGuard, kind)
	case kind == "":
		g.made = nic
	}
	return nil
}

// of tells which instance's guard an interface has: ours, another's.
func (g *guard) of(nic int) (ours, others bool, err error) {
	for _, spot := range []int{spotOut, spotIn} {
		es, err := g.dump(unix.RTM_GETTFILTER, nic, parents[spot])
		if err != nil {
			return false, false, err
		}
		for _, e := range es {
			is := e.kind == "bpf" && e.handle&0xffff0000 == guardPrefix
			ours = ours || is && e.handle == g.handle
			others = others || is && e.handle != g.handle
		}
	}
	return ours, others, nil
}

// put makes sure of the filters of active sides. repaired tells that something
// was not as we had left it.
func (g *guard) put(nic int, p *pair, active [2]bool) (repaired bool, err error) {
	var want [spots]filter
	for spot := range active {
		if active[spot] {
			want[spot] = filter{device: nic, mark: g.marks[spot]}
			want[spotKU] = filter{device: p.ku}
		}
	}
	if active[Low] {
		want[spotIn].to = p.kx
	}
	// Now, not with the first filter: it takes the device from its queue for a moment.
	for at, k := range []struct{ device, spot int }{{nic, spotIn}, {p.ku, spotKU}} {
		if g.on[at] == k.device {
			continue
		}
		if err := g.discipline(k.device, k.spot); err != nil {
			return false, fmt.Errorf("tc: %w", kernelLacks("NET_SCH_INGRESS", err))
		}
		g.on[at] = k.device
	}
	for _, spot := range []int{spotKU, spotIn, spotOut} { // where frames are carried to comes first
		if want[spot].device == 0 {
			continue
		}
		done, err := g.at(spot, want[spot])
		if err != nil {
			return repaired, fmt.Errorf("tc: %w", kernelLacks("NET_CLS_BPF, NET_ACT_MIRRED", err))
		}
		repaired = repaired || done && g.have[spot] == want[spot]
		g.have[spot] = want[spot]
	}
	return repaired, nil
}

// at puts a filter at a spot, in the place of the one that is there, if any; done
// is false if there was nothing to do.
func (g *guard) at(spot int, f filter) (done bool, err error) {
	es, err := g.dump(unix.RTM_GETTFILTER, f.device, parents[spot])
	if err != nil {
		return false, err
	}
	taken, info := map[uint32]bool{}, uint32(0)
	for _, e := range es {
		if e.handle == g.handle && e.kind == "bpf" {
			info = e.info
		}
		taken[e.info>>16] = true
	}
	if info != 0 && g.have[spot] == f {
		return false, nil
	}
	if info == 0 {
		if err := g.discipline(f.device, spot); err != nil {
			return false, err
		}
		// Before the filters of others, which only see what passes then.
		prio := uint32(1)
		for taken[prio] {
			prio++
		}
		info = prio<<16 | uint32(htons(unix.ETH_P_ALL))
	}
	ops, err := f.program()
	if err != nil {
		return false, err
	}
	return true, g.request(unix.RTM_NEWTFILTER, netlink.Create, tcmsg(f.device, g.handle, parents[spot], info), func(e *netlink.AttributeEncoder) {
		e.String(unix.TCA_KIND, "bpf")
		e.Nested(unix.TCA_OPTIONS, func(e *netlink.AttributeEncoder) error {
			const act, opsLen, ops0, flags, flagsGen = 1, 4, 5, 8, 9 // TCA_BPF_
			const direct, skipHardware = 1, 1
			e.Uint16(opsLen, uint16(len(ops)/8))
			e.Bytes(ops0, ops)
			e.Uint32(flagsGen, skipHardware)
			if f.to == 0 {
				e.Uint32(flags, direct)
				return nil
			}
			e.Nested(act, func(e *netlink.AttributeEncoder) error {
				e.Nested(1, func(e *netlink.AttributeEncoder) error { // the first action
					const kind, options, parms = 1, 2, 2 // TCA_ACT_, TCA_MIRRED_
					e.String(kind, "mirred")
					e.Nested(options, func(e *netlink.AttributeEncoder) error {
						const stolen, egressRedirect = 4, 1
						m := make([]byte, 28) // struct tc_mirred
						binary.NativeEndian.PutUint32(m[8:], stolen)
						binary.NativeEndian.PutUint32(m[20:], egressRedirect)
						binary.NativeEndian.PutUint32(m[24:], uint32(f.to))
						e.Bytes(parms, m)
						return nil
					})
					return nil
				})
				return nil
			})
			return nil
		})
	})
}

// discipline makes what holds the filters of a spot; that it is there is no error.
func (g *guard) discipline(device, spot int) error {
	kind := "clsact"
	if spot == spotKU {
		kind = "ingress"
	}
	err := g.request(unix.RTM_NEWQDISC, netlink.Create|netlink.Excl, tcmsg(device, ingressHandle, ingressParent, 0), func(e *netlink.AttributeEncoder) {
		e.String(unix.TCA_KIND, kind)
	})
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	return err
}

// program is the filter's, as struct sock_filter. What bears the mark goes on to
// other filters.
func (f *filter) program() ([]byte, error) {
	const shot, unspec, match, miss = 2, 0xffffffff, 0xffffffff, 0
	ours, others := uint32(unspec), uint32(shot) // results of one that drops by itself
	if f.to != 0 {
		ours, others = miss, match // of one with an action
	}
	p := []bpf.Instruction{bpf.RetConstant{Val: others}}
	if f.mark != 0 {
		p = []bpf.Instruction{
			bpf.LoadAbsolute{Off: extMark, Size: 4},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: f.mark, SkipFalse: 1},
			bpf.RetConstant{Val: ours}, bpf.RetConstant{Val: others},
		}
	}
	raw, err := bpf.Assemble(p)
	if err != nil {
		return nil, err
	}
	var b []byte
	for _, r := range raw {
		b = binary.NativeEndian.AppendUint16(b, r.Op)
		b = append(b, r.Jt, r.Jf)
		b = binary.NativeEndian.AppendUint32(b, r.K)
	}
	return b, nil
}

// remove takes the filters of sides away from an interface.
func (g *guard) remove(nic int, sides ...Side) error {
	for _, s := range sides {
		spot := int(s)
		es, err := g.dump(unix.RTM_GETTFILTER, nic, parents[spot])
		if err != nil {
			return fmt.Errorf("tc: %w", err)
		}
		for _, e := range es {
			if e.handle != g.handle || e.kind != "bpf" {
				continue
			}
			err := g.request(unix.RTM_DELTFILTER, 0, tcmsg(nic, e.handle, parents[spot], e.info), func(a *netlink.AttributeEncoder) {
				a.String(unix.TCA_KIND, e.kind)
			})
			if err != nil && !gone(err) {
				return fmt.Errorf("tc: %w", err)
			}
		}
		g.have[spot] = filter{}
	}
	return nil
}

// leave takes all away from an interface, also the clsact if it is ours and
// nobody else uses it.
func (g *guard) leave(nic int) error {
	if err := g.remove(nic, High, Low); err != nil || g.made != nic {
		return err
	}
	for _, spot := range []int{spotOut, spotIn} {
		if es, err := g.dump(unix.RTM_GETTFILTER, nic, parents[spot]); err != nil || len(es) > 0 {
			return err
		}
	}
	if kind, err := g.qdisc(nic); err != nil || kind != "clsact" {
		return err
	}
	if err := g.request(unix.RTM_DELQDISC, 0, tcmsg(nic, ingressHandle, ingressParent, 0), nil); err != nil && !gone(err) {
		return fmt.Errorf("tc: %w", err)
	}
	return nil
}

// gone: what was to be removed is not there.
func gone(err error) bool { return errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) }
