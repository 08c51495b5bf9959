package wire

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	nl "github.com/mdlayher/netlink"
	"github.com/mdlayher/netlink/nlenc"
	"golang.org/x/sys/unix"
)

// hops knows the Ethernet header for a destination, for the ways out that the
// kernel does not make one on. It never decides against the kernel: routes are
// the kernel's answers, neighbours the kernel's, and whatever is not known for
// sure at this moment (not yet, no more, no ordinary unicast) makes the packet
// take a raw socket, where the kernel resolves, queues and refuses as always.
//
//	destination --route--> next hop --neighbour--> header
//
// A neighbour that the kernel has not confirmed lately (STALE; RFC 4861, 7.3.2)
// is used, but one packet a second takes the raw socket: that is how the kernel
// learns that the neighbour is in use, and asks whether it is still there.
type hops struct {
	index int
	own   uint32   // see Options.Filter
	dump  *nl.Conn // questions; events come over another
	event *nl.Conn

	mu     sync.RWMutex
	mac    [6]byte
	up     bool
	blind  bool // the events have ended
	routes map[netip.Addr]*route
	neighs map[netip.Addr]*neighbour
	// generation counts changes of the above; an answer of an older one is void.
	generation atomic.Uint64

	wanted  chan netip.Addr // destinations without route
	changed chan struct{}   // routes are to be asked for again
	resync  atomic.Bool     // neighbours and queueing disciplines, too
	stop    chan struct{}   // closed when there will be no more events
	shaped  atomic.Bool     // the interface has a queueing discipline of the administrator
	done    sync.WaitGroup
}

// route is the kernel's answer about one destination.
type route struct {
	next netip.Addr // invalid: only the kernel can send there
	used atomic.Bool
}

// neighbour is an entry of the kernel's table with an address that can be used.
type neighbour struct {
	mac   [6]byte
	fresh bool
	// nudge is when the next packet is to take the raw socket, in nanoseconds since the program's start.
	nudge atomic.Int64
}

const (
	// maxHops bounds the destinations remembered.
	maxHops = 16384
	// hopsAge is how often routes are asked for again without an event: the
	// kernel tells nobody of redirects (RFC 1122, 3.2.2.2). What was not used
	// meanwhile is forgotten.
	hopsAge = 30 * time.Second
	// hopsPause is the least time between two rounds of questions.
	hopsPause = 50 * time.Millisecond
	// nudgeEvery is how often the kernel sees that a neighbour is in use.
	nudgeEvery = time.Second
)

var hopsGroups = []uint32{unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE, unix.RTNLGRP_NEXTHOP, unix.RTNLGRP_TC}

func openHops(index int, own uint32) (*hops, error) {
	h := &hops{
		index: index, own: own, routes: map[netip.Addr]*route{}, neighs: map[netip.Addr]*neighbour{},
		wanted: make(chan netip.Addr, 64), changed: make(chan struct{}, 1), stop: make(chan struct{}),
	}
	var err error
	if h.event, err = nl.Dial(unix.NETLINK_ROUTE, nil); err != nil {
		return nil, err
	}
	h.event.SetReadBuffer(1 << 20)
	for _, g := range hopsGroups {
		// Kernels before 5.3 have no next hop objects.
		if err := h.event.JoinGroup(g); err != nil && g != unix.RTNLGRP_NEXTHOP {
			h.event.Close()
			return nil, err
		}
	}
	if h.dump, err = nl.Dial(unix.NETLINK_ROUTE, nil); err != nil {
		h.event.Close()
		return nil, err
	}
	if err = h.loadNeighbours(); err == nil {
		err = h.loadQdiscs()
	}
	if err != nil {
		h.event.Close()
		h.dump.Close()
		return nil, err
	}
	h.done.Add(2)
	go h.listen()
	go h.ask()
	return h, nil
}

// close waits for the goroutines.
func (h *hops) close() {
	h.event.Close()
	h.done.Wait()
	h.dump.Close()
}

// setLink tells of the interface's own address and whether it is up.
func (h *hops) setLink(mac []byte, up bool) {
	h.mu.Lock()
	copy(h.mac[:], mac)
	h.up = up && len(mac) == len(h.mac)
	h.generation.Add(1)
	h.mu.Unlock()
	h.again()
}

// again has the routes asked for once more.
func (h *hops) again() {
	select {
	case h.changed <- struct{}{}:
	default:
	}
}

// hop is what a sender keeps of an answer.
type hop struct {
	dst        netip.Addr
	generation uint64
	header     [etherLen]byte
	lasting    bool // valid as long as the generation
}

// find fills p for the unicast destination dst; false: the raw socket is to
// take the packet. It does not allocate.
func (h *hops) find(dst netip.Addr, p *hop) bool {
	if g := h.generation.Load(); p.lasting && p.generation == g && p.dst == dst {
		return true
	}
	p.lasting = false
	h.mu.RLock()
	defer h.mu.RUnlock()
	if !h.up || h.blind {
		return false
	}
	r := h.routes[dst]
	if r == nil {
		select {
		case h.wanted <- dst:
		default: // the next packet asks
		}
		return false
	}
	if !r.used.Load() {
		r.used.Store(true)
	}
	n := h.neighs[r.next]
	if n == nil {
		return false
	}
	if !n.fresh {
		now := int64(time.Since(started))
		if at := n.nudge.Load(); now >= at && n.nudge.CompareAndSwap(at, now+int64(nudgeEvery)) {
			return false
		}
	}
	p.dst, p.generation, p.lasting = dst, h.generation.Load(), n.fresh
	copy(p.header[0:], n.mac[:])
	copy(p.header[6:], h.mac[:])
	p.header[12], p.header[13] = 0x08, 0x00
	if dst.Is6() {
		p.header[12], p.header[13] = 0x86, 0xdd
	}
	return true
}

var started = time.Now()

// listen follows the kernel's events until event is closed.
func (h *hops) listen() {
	defer h.done.Done()
	defer close(h.stop)
	defer func() {
		h.mu.Lock()
		h.blind = true
		h.generation.Add(1)
		h.mu.Unlock()
	}()
	for {
		msgs, err := h.event.Receive()
		if err != nil {
			if !errors.Is(err, unix.ENOBUFS) {
				return // closed; if not, what we know would grow old
			}
			h.resync.Store(true)
			h.again()
			continue
		}
		for _, m := range msgs {
			switch m.Header.Type {
			case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
				h.mu.Lock()
				h.neighbour(m)
				h.mu.Unlock()
			case unix.RTM_NEWQDISC, unix.RTM_DELQDISC, unix.RTM_NEWTFILTER, unix.RTM_DELTFILTER:
				h.resync.Store(true)
				h.again()
			default:
				h.again()
			}
		}
	}
}

// neighbour takes struct ndmsg and its attributes.
func (h *hops) neighbour(m nl.Message) {
	const ndmsg = 12
	if len(m.Data) < ndmsg || int(int32(nlenc.Uint32(m.Data[4:8]))) != h.index || m.Data[10]&unix.NTF_PROXY != 0 {
		return
	}
	state := nlenc.Uint16(m.Data[8:10])
	ad, err := nl.NewAttributeDecoder(m.Data[ndmsg:])
	if err != nil {
		return
	}
	var addr netip.Addr
	var mac []byte
	for ad.Next() {
		switch ad.Type() {
		case unix.NDA_DST:
			addr, _ = netip.AddrFromSlice(ad.Bytes())
		case unix.NDA_LLADDR:
			mac = ad.Bytes()
		}
	}
	if !addr.IsValid() {
		return
	}
	const fresh = unix.NUD_REACHABLE | unix.NUD_PERMANENT | unix.NUD_NOARP
	const usable = fresh | unix.NUD_STALE | unix.NUD_DELAY | unix.NUD_PROBE
	old := h.neighs[addr]
	if m.Header.Type == unix.RTM_DELNEIGH || state&usable == 0 || len(mac) != 6 || [6]byte(mac) == [6]byte{} || mac[0]&1 != 0 {
		if old != nil {
			delete(h.neighs, addr)
			h.generation.Add(1)
		}
		return
	}
	n := &neighbour{mac: [6]byte(mac), fresh: state&fresh != 0}
	if old != nil {
		if old.mac == n.mac && old.fresh == n.fresh {
			return
		}
		n.nudge.Store(old.nudge.Load())
	}
	h.neighs[addr] = n
	h.generation.Add(1)
}

// loadNeighbours reads the whole table.
func (h *hops) loadNeighbours() error {
	req := make([]byte, 12)
	nlenc.PutUint32(req[4:8], uint32(h.index))
	msgs, err := h.dump.Execute(nl.Message{Header: nl.Header{Type: unix.RTM_GETNEIGH, Flags: nl.Request | nl.Dump}, Data: req})
	if err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.neighs = map[netip.Addr]*neighbour{}
	h.generation.Add(1)
	for _, m := range msgs {
		if m.Header.Type == unix.RTM_NEWNEIGH {
			h.neighbour(m)
		}
	}
	return nil
}

// ordinary queueing disciplines are those that the kernel gives by itself, and
// their like: they neither shape nor lose on purpose.
var ordinary = map[string]bool{"": true, "noqueue": true, "mq": true, "pfifo_fast": true, "pfifo": true, "bfifo": true, "fq": true, "fq_codel": true, "ingress": true}

// loadQdiscs looks whether the administrator shapes or filters what leaves.
func (h *hops) loadQdiscs() error {
	msgs, err := h.dump.Execute(nl.Message{Header: nl.Header{Type: unix.RTM_GETQDISC, Flags: nl.Request | nl.Dump}, Data: make([]byte, 20)})
	if err != nil {
		return err
	}
	shaped := false
	for _, m := range msgs {
		const tcmsg = 20
		if len(m.Data) < tcmsg || int(int32(nlenc.Uint32(m.Data[4:8]))) != h.index {
			continue
		}
		ad, err := nl.NewAttributeDecoder(m.Data[tcmsg:])
		if err != nil {
			return err
		}
		for ad.Next() {
			if ad.Type() != unix.TCA_KIND {
				continue
			}
			kind := ad.String()
			if kind == "clsact" && h.own != 0 {
				others, err := h.filters()
				if err != nil {
					return err
				}
				shaped = shaped || others
			} else if !ordinary[kind] {
				shaped = true
			}
		}
	}
	h.shaped.Store(shaped)
	return nil
}

// filters tells whether others than ours look at what leaves.
func (h *hops) filters() (bool, error) {
	const clsactEgress = 0xfffffff3
	q := make([]byte, 20) // struct tcmsg
	binary.NativeEndian.PutUint32(q[4:], uint32(h.index))
	binary.NativeEndian.PutUint32(q[12:], clsactEgress)
	msgs, err := h.dump.Execute(nl.Message{Header: nl.Header{Type: unix.RTM_GETTFILTER, Flags: nl.Request | nl.Dump}, Data: q})
	for _, m := range msgs {
		// What has no handle is the list that holds them.
		if len(m.Data) >= len(q) && nlenc.Uint32(m.Data[8:12]) != 0 && nlenc.Uint32(m.Data[8:12]) != h.own {
			return true, err
		}
	}
	return false, err
}

// ask answers wanted, and asks again about all destinations in use when
// something has changed, or their time has come.
func (h *hops) ask() {
	defer h.done.Done()
	age := time.NewTicker(hopsAge)
	defer age.Stop()
	pause := time.NewTimer(0)
	defer pause.Stop()
	<-pause.C
	for {
		sweep := false
		select {
		case dst := <-h.wanted:
			h.learn(dst)
			continue
		case <-h.stop:
			return
		case <-h.changed:
		case <-age.C:
			sweep = true
		}
		if h.resync.Swap(false) && (h.loadNeighbours() != nil || h.loadQdiscs() != nil) {
			h.resync.Store(true) // tried again with the next event, or age
		}
		h.review(sweep)
		pause.Reset(hopsPause)
		<-pause.C
	}
}

// learn asks the kernel for the route to dst.
func (h *hops) learn(dst netip.Addr) {
	h.mu.RLock()
	known := h.routes[dst] != nil
	h.mu.RUnlock()
	if known {
		return
	}
	r := &route{next: h.kernelRoute(dst)}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.routes) >= maxHops {
		clear(h.routes)
	}
	h.routes[dst] = r
	h.generation.Add(1)
}

// review asks again about every destination; with sweep those not used since
// the last time are forgotten.
func (h *hops) review(sweep bool) {
	h.mu.Lock()
	dsts := make([]netip.Addr, 0, len(h.routes))
	for dst, r := range h.routes {
		if sweep && !r.used.Swap(false) {
			delete(h.routes, dst)
			continue
		}
		dsts = append(dsts, dst)
	}
	h.generation.Add(1) // also so that used is set again
	h.mu.Unlock()
	for _, dst := range dsts {
		next := h.kernelRoute(dst)
		h.mu.Lock()
		if r := h.routes[dst]; r != nil && r.next != next {
			h.routes[dst] = &route{next: next}
			h.generation.Add(1)
		}
		h.mu.Unlock()
	}
}

// kernelRoute returns the next hop to dst over the interface, as a raw socket
// bound to it would find it; the zero address if that is no ordinary unicast
// route.
func (h *hops) kernelRoute(dst netip.Addr) netip.Addr {
	const rtmsg = 12
	req := make([]byte, rtmsg)
	req[0], req[1] = unix.AF_INET, 32
	if dst.Is6() {
		req[0], req[1] = unix.AF_INET6, 128
	}
	ae := nl.NewAttributeEncoder()
	ae.Bytes(unix.RTA_DST, dst.AsSlice())
	ae.Uint32(unix.RTA_OIF, uint32(h.index))
	attrs, err := ae.Encode()
	if err != nil {
		return netip.Addr{}
	}
	msgs, err := h.dump.Execute(nl.Message{Header: nl.Header{Type: unix.RTM_GETROUTE, Flags: nl.Request}, Data: append(req, attrs...)})
	if err != nil || len(msgs) != 1 || msgs[0].Header.Type != unix.RTM_NEWROUTE {
		return netip.Addr{}
	}
	return nextHop(msgs[0].Data, dst, h.index)
}

// nextHop reads struct rtmsg and its attributes.
func nextHop(b []byte, dst netip.Addr, index int) netip.Addr {
	const rtmsg = 12
	if len(b) < rtmsg || b[7] != unix.RTN_UNICAST {
		return netip.Addr{}
	}
	ad, err := nl.NewAttributeDecoder(b[rtmsg:])
	if err != nil {
		return netip.Addr{}
	}
	next, out := dst, 0
	for ad.Next() {
		v := ad.Bytes()
		switch ad.Type() {
		case unix.RTA_OIF:
			if len(v) == 4 {
				out = int(nlenc.Uint32(v))
			}
		case unix.RTA_GATEWAY:
			next, _ = netip.AddrFromSlice(v)
		case unix.RTA_VIA: // a gateway of the other family (RFC 5549)
			next = netip.Addr{}
			if len(v) > 2 {
				next, _ = netip.AddrFromSlice(v[2:])
			}
		case unix.RTA_ENCAP, unix.RTA_ENCAP_TYPE, unix.RTA_NEWDST, unix.RTA_MULTIPATH:
			return netip.Addr{}
		}
	}
	if ad.Err() != nil || out != index {
		return netip.Addr{}
	}
	return next
}

// unicast reports whether the fast ways may carry an IP packet: to one host,
// with a source, of the length it says, with a good header. Else the kernel is to judge.
func unicast(b []byte, dst netip.Addr) bool {
	if dst.Is4() {
		n := int(b[0]&15) * 4
		return b[16] != 0 && b[16] < 224 && n >= 20 && n <= len(b) && int(binary.BigEndian.Uint16(b[2:])) == len(b) &&
			binary.BigEndian.Uint32(b[12:]) != 0
	}
	return b[24] != 0xff && 40+int(binary.BigEndian.Uint16(b[4:])) == len(b) && !dst.IsUnspecified() && !dst.IsLoopback() && !dst.Is4In6()
}
