package datapath

import (
	"errors"
	"net"
	"os"

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

// writeTAP writes all frames; what the kernel refuses is counted. Workers write
// side by side: the device takes frames as a whole, and packets of one flow
// come through one worker.
func (e *Engine) writeTAP(fs []tap.Frame, n *counters) error {
	if len(fs) == 0 {
		return nil
	}
	for len(fs) > 0 {
		k, err := e.c.TAP.WriteBatch(fs)
		if err != nil {
			if fatal(err) {
				return err
			}
			n.inc(DropInTAP)
			k++
		}
		fs = fs[min(k, len(fs)):]
	}
	return nil
}

// fatal tells a device that is gone from a packet that it did not want.
func fatal(err error) bool {
	return errors.Is(err, os.ErrClosed) || errors.Is(err, unix.EBADF) || errors.Is(err, unix.EBADFD) || errors.Is(err, unix.ENODEV)
}
