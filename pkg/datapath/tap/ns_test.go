package tap

import (
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/internal/nstest"
)

// TestMain runs the tests in a network namespace of their own when it may.
func TestMain(m *testing.M) { os.Exit(nstest.Main(m, "tap")) }

func needRoot(t testing.TB) {
	t.Helper()
	if nstest.Name() == "" {
		t.Skip("needs root and ip(8): makes TAPs in a network namespace")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip("needs /dev/net/tun")
	}
}

var sh = nstest.Sh

// htons for AF_PACKET.
func htons(v uint16) uint16 { return v<<8 | v>>8 }

// sniffer is an AF_PACKET socket on one interface.
type sniffer struct{ fd int }

func sniff(t testing.TB, ifname string) *sniffer {
	t.Helper()
	ifi, err := net.InterfaceByName(ifname)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: ifi.Index}); err != nil {
		t.Fatal(err)
	}
	tv := unix.NsecToTimeval(30e9)
	unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
	return &sniffer{fd}
}

// next returns the next frame for which want says yes.
func (s *sniffer) next(t testing.TB, want func([]byte) bool) []byte {
	t.Helper()
	buf := make([]byte, 70000)
	for {
		n, _, err := unix.Recvfrom(s.fd, buf, 0)
		if err != nil {
			t.Fatalf("no such frame: %v", err)
		}
		if want(buf[:n]) {
			return buf[:n]
		}
	}
}
