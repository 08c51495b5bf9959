package bump

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	nl "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// settings are what the host has given an interface, to be given to another one of
// the same name and index, or to the same one after it was away. Addresses, routes,
// next hops and neighbours are the kernel's own messages, so that no field is
// lost that nobody here knows.
type settings struct {
	Name     string
	Index    int
	MAC      net.HardwareAddr
	MTU      int
	TxQLen   int
	Alias    string
	AltNames []string
	Group    int
	Master   int    // index; 0: none
	Flags    uint32 // IFF_

	Sysctls map[string]map[string]string // by directory below /proc/sys/net, by file
	Port    map[string]string            // of a bridge, by file of its brport

	Addrs    [][]byte // ifaddrmsg
	Nexthops [][]byte // nhmsg
	Routes   [][]byte // rtmsg
	Neighs   [][]byte // ndmsg

	Taken int64 // when, in nanoseconds of the boot clock
}

// sysctlDirs are those below /proc/sys/net that hold a directory for each interface.
var sysctlDirs = []string{"ipv4/conf", "ipv4/neigh", "ipv6/conf", "ipv6/neigh"}

// rt is a conversation about links, addresses and routes in raw messages.
type rt struct{ c *nl.Conn }

// openRT opens one in a network namespace; 0: in that of the caller.
func openRT(netns int) (rt, error) {
	c, err := nl.Dial(unix.NETLINK_ROUTE, &nl.Config{NetNS: netns})
	return rt{c}, err
}

func (r rt) request(kind int, flags nl.HeaderFlags, msg []byte) error {
	_, err := r.c.Execute(nl.Message{
		Header: nl.Header{Type: nl.HeaderType(kind), Flags: nl.Request | nl.Acknowledge | flags},
		Data:   msg,
	})
	return err
}

// dump lists all messages of a kind, whose fixed part is of n octets. A kernel that
// does not know the kind has none.
func (r rt) dump(kind, n int, ask []byte) (ms [][]byte, err error) {
	replies, err := r.c.Execute(nl.Message{
		Header: nl.Header{Type: nl.HeaderType(kind), Flags: nl.Request | nl.Dump},
		Data:   append(ask, make([]byte, n-len(ask))...),
	})
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil
	}
	for _, m := range replies {
		if len(m.Data) >= n {
			ms = append(ms, m.Data)
		}
	}
	return ms, err
}

// Lengths of the fixed parts of messages.
const (
	addrLen    = unix.SizeofIfAddrmsg
	routeLen   = unix.SizeofRtMsg
	neighLen   = unix.SizeofNdMsg
	nexthopLen = 8 // struct nhmsg
)

// eachAttr calls f with the attributes in b; v lies in b.
func eachAttr(b []byte, f func(kind uint16, v []byte)) {
	for len(b) >= unix.SizeofRtAttr {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofRtAttr || n > len(b) {
			return
		}
		f(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofRtAttr:n])
		b = b[min(len(b), (n+3)&^3):]
	}
}

// attr returns an attribute of the message m behind its first n octets, nil if there is none.
func attr(m []byte, n int, kind uint16) (v []byte) {
	eachAttr(m[n:], func(k uint16, x []byte) {
		if k == kind && v == nil {
			v = x
		}
	})
	return v
}

func attrU32(m []byte, n int, kind uint16) uint32 {
	if v := attr(m, n, kind); len(v) >= 4 {
		return binary.NativeEndian.Uint32(v)
	}
	return 0
}

func appendAttr(m []byte, kind uint16, v []byte) []byte {
	m = binary.NativeEndian.AppendUint16(m, uint16(unix.SizeofRtAttr+len(v)))
	m = binary.NativeEndian.AppendUint16(m, kind)
	m = append(m, v...)
	return append(m, make([]byte, -len(m)&3)...)
}

// without copies a message and leaves attributes out.
func without(m []byte, n int, kinds ...uint16) []byte {
	out := bytes.Clone(m[:n])
	for b := m[n:]; len(b) >= unix.SizeofRtAttr; {
		l := int(binary.NativeEndian.Uint16(b))
		if l < unix.SizeofRtAttr || l > len(b) {
			break
		}
		whole := b[:min(len(b), (l+3)&^3)]
		if !slices.Contains(kinds, binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER)) {
			out = append(out, whole...)
		}
		b = b[len(whole):]
	}
	return out
}

// readSettings takes down what the interface of an index has.
func readSettings(h *netlink.Handle, r rt, index int) (*settings, error) {
	l, err := h.LinkByIndex(index)
	if err != nil {
		return nil, err
	}
	a := l.Attrs()
	s := &settings{
		Name: a.Name, Index: a.Index, MAC: a.HardwareAddr, MTU: a.MTU, TxQLen: a.TxQLen, Alias: a.Alias, AltNames: a.AltNames,
		Group: int(a.Group), Master: a.MasterIndex, Flags: a.RawFlags, Sysctls: map[string]map[string]string{}, Taken: bootTime(),
	}
	for _, dir := range sysctlDirs {
		s.Sysctls[dir] = readFiles(filepath.Join("/proc/sys/net", dir, a.Name))
	}
	if s.Master != 0 {
		s.Port = readFiles(filepath.Join("/sys/class/net", a.Name, "brport"))
	}
	if s.Addrs, err = readAddrs(r, index); err != nil {
		return nil, fmt.Errorf("addresses: %w", err)
	}
	var ids map[uint32]bool
	if s.Nexthops, ids, err = readNexthops(r, index); err != nil {
		return nil, fmt.Errorf("next hops: %w", err)
	}
	own := map[string]bool{}
	for _, m := range s.Addrs {
		own[string(attr(m, addrLen, unix.IFA_LOCAL))], own[string(attr(m, addrLen, unix.IFA_ADDRESS))] = true, true
	}
	delete(own, "") // IPv6 has no IFA_LOCAL
	if s.Routes, err = readRoutes(r, func(m []byte) bool {
		return leadsBy(m, index) || ids[attrU32(m, routeLen, rtaNHID)] || own[string(attr(m, routeLen, unix.RTA_PREFSRC))]
	}); err != nil {
		return nil, fmt.Errorf("routes: %w", err)
	}
	if s.Neighs, err = readNeighs(r, index); err != nil {
		return nil, fmt.Errorf("neighbours: %w", err)
	}
	return s, nil
}

// readFiles reads what can be read of the small files of a directory.
func readFiles(dir string) map[string]string {
	files := map[string]string{}
	es, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	for _, e := range es {
		if b, err := os.ReadFile(filepath.Join(dir, e.Name())); err == nil {
			files[e.Name()] = strings.TrimSuffix(string(b), "\n")
		}
	}
	return files
}

// writeFiles writes those that differ. What the kernel refuses is as it is: files
// that only tell, or that it makes of others.
func writeFiles(dir string, files map[string]string, but ...string) {
	now := readFiles(dir)
	for name, v := range files {
		if now[name] != v && !slices.Contains(but, name) {
			os.WriteFile(filepath.Join(dir, name), []byte(v), 0)
		}
	}
}

// bootTime is the time since boot, sleep included.
func bootTime() int64 {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) != nil {
		return 0
	}
	return ts.Nano()
}

// addrFlags are those of an address.
func addrFlags(m []byte) uint32 {
	if f := attrU32(m, addrLen, unix.IFA_FLAGS); f != 0 {
		return f
	}
	return uint32(m[2])
}

// withFlags is the address with other flags.
func withFlags(m []byte, flags uint32) []byte {
	m = without(m, addrLen, unix.IFA_FLAGS)
	m[2] = byte(flags)
	return appendAttr(m, unix.IFA_FLAGS, binary.NativeEndian.AppendUint32(nil, flags))
}

func readAddrs(r rt, index int) (ms [][]byte, err error) {
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		all, err := r.dump(unix.RTM_GETADDR, addrLen, []byte{family})
		if err != nil {
			return nil, err
		}
		for _, m := range all {
			if m[0] == family && binary.NativeEndian.Uint32(m[4:]) == uint32(index) {
				ms = append(ms, m)
			}
		}
	}
	return ms, nil
}

// addrKey tells addresses apart: all but flags and lifetimes.
func addrKey(m []byte) string {
	return string(m[:2]) + "/" + string(attr(m, addrLen, unix.IFA_LOCAL)) + "/" + string(attr(m, addrLen, unix.IFA_ADDRESS))
}

// Numbers of linux/nexthop.h.
const (
	nhaID    = 1
	nhaGroup = 2
	nhaOIF   = 5
	rtaNHID  = 30 // of linux/rtnetlink.h
)

// readNexthops reads the objects that lead by an interface, and the groups of them.
func readNexthops(r rt, index int) (ms [][]byte, ids map[uint32]bool, err error) {
	all, err := r.dump(unix.RTM_GETNEXTHOP, nexthopLen, nil)
	if err != nil {
		return nil, nil, err
	}
	ids = map[uint32]bool{}
	take := func(m []byte) {
		ids[attrU32(m, nexthopLen, nhaID)] = true
		m = without(m, nexthopLen, 14, 15, 17) // NHA_OP_FLAGS and what it asks for
		m[1] = 0                               // the scope is the kernel's to say
		binary.NativeEndian.PutUint32(m[4:], binary.NativeEndian.Uint32(m[4:])&unix.RTNH_F_ONLINK)
		ms = append(ms, m)
	}
	for _, m := range all {
		if attrU32(m, nexthopLen, nhaOIF) == uint32(index) {
			take(m)
		}
	}
	for _, m := range all {
		for g := attr(m, nexthopLen, nhaGroup); len(g) >= 8; g = g[8:] { // struct nexthop_grp
			if ids[binary.NativeEndian.Uint32(g)] {
				take(m)
				break
			}
		}
	}
	return ms, ids, nil
}

// eachHop calls f with the fixed parts of the hops of a multipath route.
func eachHop(v []byte, f func(hop []byte)) {
	for len(v) >= unix.SizeofRtNexthop {
		n := int(binary.NativeEndian.Uint16(v))
		if n < unix.SizeofRtNexthop || n > len(v) {
			return
		}
		f(v[:unix.SizeofRtNexthop])
		v = v[min(len(v), (n+3)&^3):]
	}
}

// leadsBy: a route leaves by an interface, perhaps among others.
func leadsBy(m []byte, index int) (is bool) {
	is = attrU32(m, routeLen, unix.RTA_OIF) == uint32(index)
	eachHop(attr(m, routeLen, unix.RTA_MULTIPATH), func(hop []byte) {
		is = is || binary.NativeEndian.Uint32(hop[4:]) == uint32(index)
	})
	return is
}

// readRoutes reads those that somebody has made, as they are to be made again.
func readRoutes(r rt, want func(m []byte) bool) (ms [][]byte, err error) {
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		all, err := r.dump(unix.RTM_GETROUTE, routeLen, []byte{family})
		if err != nil {
			return nil, err
		}
		for _, m := range all {
			flags, table, proto, kind := binary.NativeEndian.Uint32(m[8:]), m[4], m[5], m[7]
			kernels := proto == unix.RTPROT_KERNEL && (table == unix.RT_TABLE_LOCAL || kind != unix.RTN_UNICAST)
			if m[0] == family && flags&unix.RTM_F_CLONED == 0 && !kernels && want(m) {
				ms = append(ms, remake(m))
			}
		}
	}
	return ms, nil
}

// remake makes of a route as the kernel tells it the one that it takes.
func remake(m []byte) []byte {
	drop := []uint16{unix.RTA_CACHEINFO}
	if attr(m, routeLen, rtaNHID) != nil { // it tells what is behind the number, too
		drop = append(drop, unix.RTA_GATEWAY, unix.RTA_OIF, unix.RTA_MULTIPATH, unix.RTA_VIA)
	}
	out := without(m, routeLen, drop...)
	binary.NativeEndian.PutUint32(out[8:], binary.NativeEndian.Uint32(out[8:])&(unix.RTNH_F_ONLINK|unix.RTNH_F_PERVASIVE))
	eachHop(attr(out, routeLen, unix.RTA_MULTIPATH), func(hop []byte) { hop[2] &= unix.RTNH_F_ONLINK | unix.RTNH_F_PERVASIVE })
	const hz = 100 // USER_HZ
	if c := attr(m, routeLen, unix.RTA_CACHEINFO); m[0] == unix.AF_INET6 && len(c) >= 12 {
		if left := int32(binary.NativeEndian.Uint32(c[8:])); left > 0 { // rta_expires
			out = appendAttr(out, unix.RTA_EXPIRES, binary.NativeEndian.AppendUint32(nil, uint32(left+hz-1)/hz))
		}
	}
	return out
}

// routeKey tells routes apart: all but their end.
func routeKey(m []byte) string { return string(without(m, routeLen, unix.RTA_EXPIRES)) }

const (
	nudPermanent = 0x80
	nudStale     = 0x04
	nudKnown     = nudPermanent | nudStale | 0x02 | 0x08 | 0x10 // reachable, delay, probe
	ntfProxy     = 0x08
)

// readNeighs reads entries and proxies. What was learned is worth another look.
func readNeighs(r rt, index int) (ms [][]byte, err error) {
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		for _, flags := range []byte{0, ntfProxy} {
			ask := make([]byte, neighLen)
			ask[0], ask[10] = family, flags
			all, err := r.dump(unix.RTM_GETNEIGH, neighLen, ask)
			if err != nil {
				return nil, err
			}
			for _, m := range all {
				state := binary.NativeEndian.Uint16(m[8:])
				if m[0] != family || binary.NativeEndian.Uint32(m[4:]) != uint32(index) || m[10]&ntfProxy != flags ||
					flags == 0 && (state&nudKnown == 0 || m[11] != unix.RTN_UNICAST || attr(m, neighLen, unix.NDA_LLADDR) == nil) {
					continue
				}
				m = without(m, neighLen, unix.NDA_CACHEINFO, unix.NDA_PROBES)
				if flags == 0 && state&nudPermanent == 0 {
					binary.NativeEndian.PutUint16(m[8:], nudStale)
				}
				ms = append(ms, m)
			}
		}
	}
	return ms, nil
}

// reindex has all lead by another index.
func (s *settings) reindex(index int) {
	patch := func(v []byte) {
		if len(v) >= 4 && binary.NativeEndian.Uint32(v) == uint32(s.Index) {
			binary.NativeEndian.PutUint32(v, uint32(index))
		}
	}
	for _, m := range s.Addrs {
		patch(m[4:8])
	}
	for _, m := range s.Neighs {
		patch(m[4:8])
	}
	for _, m := range s.Nexthops {
		patch(attr(m, nexthopLen, nhaOIF))
	}
	for _, m := range s.Routes {
		patch(attr(m, routeLen, unix.RTA_OIF))
		eachHop(attr(m, routeLen, unix.RTA_MULTIPATH), func(hop []byte) { patch(hop[4:]) })
	}
	s.Index = index
}

// apply gives them to the interface that has the index now. What it gets by itself
// and had not is taken from it. An error tells what of it is not to be had; the rest
// is done. To do it twice does no harm.
func (s *settings) apply(h *netlink.Handle, r rt, index int) error {
	l, err := h.LinkByIndex(index)
	if err != nil {
		return err
	}
	if index != s.Index {
		s.reindex(index)
	}
	var errs []error
	try := func(what string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
		}
	}
	a := l.Attrs()
	if a.Name != s.Name {
		try("name", h.LinkSetName(l, s.Name))
	}
	if !bytes.Equal(a.HardwareAddr, s.MAC) {
		try("mac", h.LinkSetHardwareAddr(l, s.MAC))
	}
	if a.MTU != s.MTU {
		try("mtu", h.LinkSetMTU(l, s.MTU))
	}
	if a.TxQLen != s.TxQLen {
		try("txqueuelen", h.LinkSetTxQLen(l, s.TxQLen))
	}
	if a.Alias != s.Alias {
		try("alias", h.LinkSetAlias(l, s.Alias))
	}
	if int(a.Group) != s.Group {
		try("group", h.LinkSetGroup(l, s.Group))
	}
	for _, name := range s.AltNames {
		if !slices.Contains(a.AltNames, name) {
			try("altname", h.LinkAddAltName(l, name))
		}
	}
	for _, f := range []struct {
		flag    uint32
		on, off func(netlink.Link) error
	}{
		{unix.IFF_NOARP, h.LinkSetARPOff, h.LinkSetARPOn},
		{unix.IFF_ALLMULTI, h.LinkSetAllmulticastOn, h.LinkSetAllmulticastOff},
		{unix.IFF_PROMISC, h.SetPromiscOn, h.SetPromiscOff},
	} {
		switch {
		case s.Flags&f.flag != 0 && a.RawFlags&f.flag == 0:
			try("flags", f.on(l))
		case s.Flags&f.flag == 0 && a.RawFlags&f.flag != 0:
			try("flags", f.off(l))
		}
	}
	// Link-local addresses are made from the record, without a new look for doubles.
	const genMode, genNone = "addr_gen_mode", "1"
	six := filepath.Join("/proc/sys/net/ipv6/conf", s.Name)
	writeFiles(six, map[string]string{genMode: genNone})
	for dir, files := range s.Sysctls {
		writeFiles(filepath.Join("/proc/sys/net", dir, s.Name), files, genMode)
	}
	if s.Master != 0 {
		try("master", h.LinkSetMasterByIndex(l, s.Master))
		writeFiles(filepath.Join("/sys/class/net", s.Name, "brport"), s.Port)
	}
	if s.Flags&unix.IFF_UP != 0 {
		try("up", h.LinkSetUp(l))
	}
	try("addresses", s.applyAddrs(r))
	if mode, ok := s.Sysctls["ipv6/conf"][genMode]; ok {
		writeFiles(six, map[string]string{genMode: mode})
	}
	try("addresses", s.spareAddrs(r)) // one that this has made
	for _, m := range s.Nexthops {
		try("next hop", r.request(unix.RTM_NEWNEXTHOP, nl.Create|nl.Replace, m))
	}
	try("routes", s.applyRoutes(r))
	for _, m := range s.Neighs {
		try("neighbour", r.request(unix.RTM_NEWNEIGH, nl.Create|nl.Replace, m))
	}
	return errors.Join(errs...)
}

// applyAgain is apply, and twice more where something is refused: a driver may not be
// ready as soon as it is asked.
func (s *settings) applyAgain(h *netlink.Handle, r rt, index int) error {
	err := s.apply(h, r, index)
	for tries := 2; err != nil && tries > 0; tries-- {
		time.Sleep(50 * time.Millisecond)
		err = s.apply(h, r, index)
	}
	return err
}

// applyAddrs gives the interface its addresses.
func (s *settings) applyAddrs(r rt) error {
	var errs []error
	old := uint32(max(0, bootTime()-s.Taken) / int64(time.Second))
	// The kernel puts an address of IPv4 behind the others, one of IPv6 before them.
	six := slices.IndexFunc(s.Addrs, func(m []byte) bool { return m[0] == unix.AF_INET6 })
	for k := range s.Addrs {
		if six >= 0 && k >= six {
			k = len(s.Addrs) - 1 - (k - six)
		}
		m := bytes.Clone(s.Addrs[k])
		if c := attr(m, addrLen, unix.IFA_CACHEINFO); len(c) >= 8 { // preferred, valid
			if valid := binary.NativeEndian.Uint32(c[4:]); valid <= old {
				continue
			}
			for k := 0; k < 8; k += 4 {
				const forever = 0xffffffff
				if v := binary.NativeEndian.Uint32(c[k:]); v != forever {
					binary.NativeEndian.PutUint32(c[k:], v-min(v, old))
				}
			}
		}
		flags := addrFlags(m)
		if m[0] == unix.AF_INET6 && flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_NODAD) == 0 {
			// It was found to be unique, and is to serve at once.
			if err := r.request(unix.RTM_NEWADDR, nl.Create|nl.Replace, withFlags(m, flags|unix.IFA_F_NODAD)); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		if err := r.request(unix.RTM_NEWADDR, nl.Create|nl.Replace, m); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// spareAddrs takes away the addresses that are not among them.
func (s *settings) spareAddrs(r rt) error {
	now, err := readAddrs(r, s.Index)
	if err != nil {
		return err
	}
	want := map[string]bool{}
	for _, m := range s.Addrs {
		want[addrKey(m)] = true
	}
	for _, m := range now {
		if !want[addrKey(m)] && addrFlags(m)&unix.IFA_F_TEMPORARY == 0 {
			if e := r.request(unix.RTM_DELADDR, 0, m); !errors.Is(e, unix.EADDRNOTAVAIL) {
				err = errors.Join(err, e)
			}
		}
	}
	return err
}

// applyRoutes makes the routes, in an order in which the kernel takes them, and
// takes away those by the interface that are not among them.
func (s *settings) applyRoutes(r rt) error {
	now, err := readRoutes(r, func([]byte) bool { return true })
	if err != nil {
		return err
	}
	want, have := map[string]bool{}, map[string]bool{}
	for _, m := range s.Routes {
		want[routeKey(m)] = true
	}
	for _, m := range now {
		if k := routeKey(m); leadsBy(m, s.Index) && !want[k] {
			err = errors.Join(err, r.request(unix.RTM_DELROUTE, 0, m))
		} else {
			have[k] = true
		}
	}
	pending := slices.DeleteFunc(slices.Clone(s.Routes), func(m []byte) bool { return have[routeKey(m)] })
	for len(pending) > 0 {
		var later [][]byte
		var refused error
		for _, m := range pending {
			flags := nl.Create
			switch {
			case m[0] == unix.AF_INET:
				flags |= nl.Append // several of one prefix keep their order
			case attr(m, routeLen, unix.RTA_MULTIPATH) != nil:
				flags |= nl.Replace // of IPv6 the hops by other interfaces have stayed
			}
			if e := r.request(unix.RTM_NEWROUTE, flags, m); e != nil && !errors.Is(e, os.ErrExist) {
				refused = e
				later = append(later, m)
			}
		}
		if len(later) == len(pending) {
			return errors.Join(err, refused)
		}
		pending = later
	}
	return err
}
