package datapath

import (
	"errors"
	"net"
	"os"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/neigh"
	"github.com/missiu/missiu/pkg/datapath/tap"
)

// putEther writes the Ethernet header of a frame for the kernel: to the TAP's
// own address, or the stack takes it for somebody else's.
func putEther(b []byte, mac net.HardwareAddr, version uint8) {
	copy(b[0:6], mac)
	copy(b[6:12], neigh.MAC[:])
	b[12], b[13] = 0x08, 0x00
	if version == 6 {
		b[12], b[13] = 0x86, 0xdd
	}
}

// writeTAP writes all frames on a queue, nil for the first; what the kernel
// refuses is counted. Workers write side by side: the device takes frames as a
// whole, and packets of one flow come through one worker.
func (e *Engine) writeTAP(q tap.Queue, fs []tap.Frame, n *counters) error {
	if len(fs) == 0 {
		return nil
	}
	if q == nil {
		q = e.c.TAP
	}
	for len(fs) > 0 {
		k, err := q.WriteBatch(fs)
		if err != nil {
			if fatal(err) {
				return err
			}
			if k < len(fs) {
				n.add(DropInTAP, packets(&fs[k]))
			}
			k++
		}
		fs = fs[min(k, len(fs)):]
	}
	return nil
}

// packets is how many a frame stands for.
func packets(f *tap.Frame) uint {
	if f.Offload.GSOSize == 0 {
		return 1
	}
	size := int(f.Offload.GSOSize)
	return uint(max(1, (f.Len-int(f.Offload.HdrLen)+size-1)/size))
}

// super says which super-frames the TAP takes, and tells once if that has become less.
func (e *Engine) super() tap.Super {
	s := e.c.TAP.Super()
	if s != e.super0 {
		e.superOnce.Do(func() {
			e.c.Log.Warn("the kernel refuses super-frames that it took at first; packets go to it one by one", zap.Any("still", s))
		})
	}
	return s
}

// fatal tells a device that is gone from a packet that it did not want.
func fatal(err error) bool {
	return errors.Is(err, os.ErrClosed) || errors.Is(err, unix.EBADF) || errors.Is(err, unix.EBADFD) || errors.Is(err, unix.ENODEV)
}
