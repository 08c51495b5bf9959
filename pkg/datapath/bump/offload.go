package bump

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/tap"
)

// What the stack and the interface leave for later on a frame (segmentation,
// checksum) comes over the pair as it is, as far as KX has the features: then 64 KiB
// of a TCP stream are one frame for us, and one for whoever we write it to. The
// rest the kernel does before KX sends: what a virtio_net_hdr cannot tell has to be
// done there (tunnels, SCTP, lists, identifications that do not count), or it would
// get lost on the way to us.
//
// Both ends on two processors that had much other work, one TCP stream over a veth,
// finished frames and these in turn, medians of three rounds:
//
//	bypassed                      0.57   5.6   Gbit/s     13.8   1.3   µs of both daemons for a packet
//	transport mode, native ESP    0.68   0.86  Gbit/s     10.1   8.1
//
// and of one round with ESP in UDP 0.75 and 1.8 Gbit/s. Of native ESP each packet
// passes the pair and a packet socket alone at the receiver; a ring of memory shared with the kernel
// (TPACKET_V2) in the place of recvmmsg there made no difference beyond the noise.

// features of KX that are on, by the names that the kernel gives them.
var features = map[string]bool{
	"tx-checksum-ip-generic": true,
	"tx-tcp-segmentation":    true,
	"tx-tcp6-segmentation":   true,
	udpSegmentation:          true,
}

const udpSegmentation = "tx-udp-segmentation"

// ours: a feature has to be as we want it.
func ours(name string) bool {
	return strings.HasPrefix(name, "tx-checksum-") || strings.HasPrefix(name, "tx-gso-") ||
		strings.HasPrefix(name, "tx-") && strings.HasSuffix(name, "-segmentation")
}

// offloads switches KX's features, and finds out which super-frames it hands over.
// With none it hands over finished frames alone. mark is one that no reader at KU wants.
func offloads(kx string, index int, mode string, mark uint32) (tap.Super, error) {
	none := func() (tap.Super, error) {
		if err := ethtool(kx, unix.ETHTOOL_STXCSUM, 0); err != nil { // which the others depend on
			return tap.Super{}, fmt.Errorf("%s: offloads: %w", kx, err)
		}
		return tap.Super{}, nil
	}
	if mode == tap.OffloadNone {
		return none()
	}
	s, err := probe(index, mark)
	if err != nil {
		return tap.Super{}, fmt.Errorf("%s: %w", kx, err)
	}
	want := func(name string) bool { return features[name] && (name != udpSegmentation || s.UDP) }
	on, err := setFeatures(kx, want)
	if err != nil {
		return none()
	}
	for name := range on {
		if ours(name) && !want(name) {
			return none()
		}
	}
	return tap.Super{
		TCP4: s.TCP4 && on["tx-tcp-segmentation"],
		TCP6: s.TCP6 && on["tx-tcp6-segmentation"],
		UDP:  s.UDP && on[udpSegmentation],
	}, nil
}

// probe finds out which super-frames the kernel takes by packet sockets, which are
// those that it gives, too. The frames go to KU, whose readers do not want
// their mark.
func probe(kx int, mark uint32) (tap.Super, error) {
	s, err := packetSocket(socketOptions{index: kx, mark: mark})
	if err != nil {
		return tap.Super{}, err
	}
	defer s.close()
	return tap.ProbeSuper(func(f *tap.Frame) syscall.Errno {
		if _, err := s.write([]tap.Frame{*f}); errors.Is(err, unix.EINVAL) {
			return unix.EINVAL
		}
		return 0
	}), nil
}

// Structures and numbers of linux/ethtool.h.
const (
	setFeatureNames = 4 // ETH_SS_FEATURES
	featureNameLen  = 32
)

type featureNames struct {
	cmd, set, n uint32
	names       [1024][featureNameLen]byte
}

type featureBits struct {
	cmd, blocks uint32
	b           [1024 / 32]struct{ valid, requested uint32 }
}

type featureState struct {
	cmd, blocks uint32
	b           [1024 / 32]struct{ available, requested, active, neverChanged uint32 }
}

// setFeatures switches the features that are ours on or off, and returns those of
// all that are on.
func setFeatures(ifname string, want func(name string) bool) (on map[string]bool, err error) {
	count := struct {
		cmd, _ uint32
		mask   uint64
		n      uint32
	}{cmd: unix.ETHTOOL_GSSET_INFO, mask: 1 << setFeatureNames}
	if err := ethtoolCall(ifname, unsafe.Pointer(&count)); err != nil {
		return nil, err
	}
	names := &featureNames{cmd: unix.ETHTOOL_GSTRINGS, set: setFeatureNames, n: count.n}
	if count.mask == 0 || int(count.n) > len(names.names) {
		return nil, unix.EOPNOTSUPP
	}
	if err := ethtoolCall(ifname, unsafe.Pointer(names)); err != nil {
		return nil, err
	}
	blocks := (count.n + 31) / 32
	set, get := &featureBits{cmd: unix.ETHTOOL_SFEATURES, blocks: blocks}, &featureState{cmd: unix.ETHTOOL_GFEATURES, blocks: blocks}
	each := func(f func(name string, block, bit uint32)) {
		for k := range names.n {
			name, _, _ := bytes.Cut(names.names[k][:], []byte{0})
			f(string(name), k/32, 1<<(k%32))
		}
	}
	if err := ethtoolCall(ifname, unsafe.Pointer(get)); err != nil {
		return nil, err
	}
	each(func(name string, block, bit uint32) {
		// Those that cannot be switched are refused all together.
		if !ours(name) || get.b[block].available&bit == 0 || get.b[block].neverChanged&bit != 0 {
			return
		}
		set.b[block].valid |= bit
		if want(name) {
			set.b[block].requested |= bit
		}
	})
	if err := ethtoolCall(ifname, unsafe.Pointer(set)); err != nil {
		return nil, err
	}
	if err := ethtoolCall(ifname, unsafe.Pointer(get)); err != nil {
		return nil, err
	}
	on = map[string]bool{}
	each(func(name string, block, bit uint32) {
		if get.b[block].active&bit != 0 {
			on[name] = true
		}
	})
	return on, nil
}

// ethtoolCall does the request that data begins with.
func ethtoolCall(ifname string, data unsafe.Pointer) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var req struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	copy(req.name[:unix.IFNAMSIZ-1], ifname)
	req.data = data
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return errno
	}
	return nil
}

// ethtool does one of the requests that carry a number.
func ethtool(ifname string, request, v uint32) error {
	_, err := ethtoolValue(ifname, request, v)
	return err
}

func ethtoolValue(ifname string, request, v uint32) (uint32, error) {
	value := [2]uint32{request, v}
	err := ethtoolCall(ifname, unsafe.Pointer(&value))
	return value[1], err
}
