package e2e

import (
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// The tests of this file prove the laboratory itself; they need no missiu.

func TestLabHosts(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.NewHost(t, "a"), lab.NewHost(t, "b")
	lab.Link(t, a, b, "eth0", prefixes("192.168.3.118/24", "fd00:3::118/64"), prefixes("192.168.3.119/24", "fd00:3::119/64"))
	before := a.Snapshot()

	c := a.Capture("eth0")
	if got := a.Ping(5, "192.168.3.119"); got != 5 {
		t.Errorf("ping: %d of 5", got)
	}
	if got := a.Ping(5, "fd00:3::119"); got != 5 {
		t.Errorf("ping6: %d of 5", got)
	}
	if got := a.Silence(1, "192.168.3.77"); got != 0 {
		t.Errorf("a host that does not exist answered %d times", got)
	}
	n := lab.Count(c.Stop())
	if n[lab.Clear] != 20 || n[lab.Neighbour] == 0 || n[lab.ESP] != 0 {
		t.Errorf("captured %v, want 20 in clear and some neighbours", n)
	}

	// Private /run, /etc/missiu and processes.
	a.WriteFile("/run/missiu/x", "a", 0o600)
	a.WriteFile("/etc/missiu/y", "a", 0o600)
	for _, f := range []string{"/run/missiu/x", "/etc/missiu/y"} {
		if r := b.Run("cat", f); r.Code == 0 {
			t.Errorf("b sees %s of a", f)
		}
		if got := a.Must("cat", f); got != "a" {
			t.Errorf("%s: %q", f, got)
		}
	}
	p, q := a.Start("sleep", "1000"), b.Start("sleep", "1000")
	p.Pid() // has started
	a.Must("killall", "sleep")
	if got := p.Wait(10 * time.Second); got == 0 {
		t.Error("killall of a missed its sleep")
	}
	if q.Ended() {
		t.Error("killall of a reached b")
	}
	q.Signal(syscall.SIGKILL)
	q.Wait(10 * time.Second)

	diff := before.Diff(a.Snapshot())
	if !strings.Contains(diff, "run: new:  /run/missiu/x f 600") || !strings.Contains(diff, "etc: new:  /etc/missiu/y") {
		t.Errorf("snapshot missed the new files:\n%s", diff)
	}
	a.Must("rm", "-r", "/run/missiu", "/etc/missiu/y")
	a.Sh("nft add table inet t; ip route add 10.0.0.0/8 dev eth0; echo 1 >/proc/sys/net/ipv4/conf/eth0/accept_local; ip tuntap add d0 mode tap")
	diff = before.Diff(a.Snapshot())
	for _, want := range []string{"nftables: new:", "routes: new:  10.0.0.0/8", "sysctls: gone: ipv4/conf/eth0/accept_local:0", "links: new:"} {
		if !strings.Contains(diff, want) {
			t.Errorf("snapshot missed %q:\n%s", want, diff)
		}
	}
	a.Sh("nft delete table inet t; ip route del 10.0.0.0/8 dev eth0; echo 0 >/proc/sys/net/ipv4/conf/eth0/accept_local; ip link del d0")
	if diff := before.Diff(a.Snapshot()); diff != "" {
		t.Errorf("not as before:\n%s", diff)
	}
	if got := a.Python("import scapy, sys; print('scapy', sys.argv[1])", "x"); got != "scapy x\n" {
		t.Errorf("python: %q", got)
	}
}

// Two strongSwans through their own tunnel: the peer is known to work before
// ours meets it.
func TestLabStrongSwan(t *testing.T) {
	lab.NeedRoot(t)
	for _, esp := range []string{"aes128-sha1", "aes256gcm16", "chacha20poly1305"} {
		t.Run(esp, func(t *testing.T) {
			a, b := lab.NewHost(t, "a"), lab.NewHost(t, "b")
			lab.Link(t, a, b, "eth0", prefixes("192.168.3.118/24"), prefixes("192.168.3.119/24"))
			a.Must("ip", "addr", "add", "10.1.0.1/24", "dev", "lo")
			b.Must("ip", "addr", "add", "10.2.0.1/24", "dev", "lo")
			conn := lab.SwanConn{Local: "192.168.3.118", Remote: "192.168.3.119", LocalTS: "10.1.0.0/24", RemoteTS: "10.2.0.0/24", PSK: "a secret of the test", ESP: esp}
			sa := lab.StartStrongSwan(a, conn)
			conn.Local, conn.Remote, conn.LocalTS, conn.RemoteTS = conn.Remote, conn.Local, conn.RemoteTS, conn.LocalTS
			sb := lab.StartStrongSwan(b, conn)
			c := a.Capture("eth0")
			sa.Initiate()
			if got := a.Ping(10, "-I", "10.1.0.1", "10.2.0.1"); got != 10 {
				t.Errorf("ping: %d of 10", got)
			}
			if !strings.Contains(sb.SAs(), "INSTALLED") {
				t.Errorf("no child on b: %s", sb.SAs())
			}
			ps := c.Stop()
			lab.NoClear(t, ps)
			n := lab.Count(ps)
			if n[lab.ESPinUDP] != 20 || n[lab.ESP] != 0 || n[lab.IKE] < 4 {
				t.Errorf("captured %v, want 20 ESP in UDP and at least 4 IKE", n)
			}
		})
	}
}

const (
	key16  = "000102030405060708090a0b0c0d0e0f"
	key20  = key16 + "10111213"
	key32  = key16 + "101112131415161718191a1b1c1d1e1f"
	salt   = "a0a1a2a3"
	umlOur = "192.168.3.118"
	umlIts = "192.168.3.119"
)

// An ESP packet made by scapy is accepted by the Linux peer, and scapy and
// tshark open its protected answer.
func TestLabLinuxPeer(t *testing.T) {
	lab.NeedRoot(t)
	a := lab.NewHost(t, "a")
	l := lab.BootLinux(a, "eth0", umlIts+"/24", "fd00:3::119/64")
	a.Must("ip", "addr", "add", umlOur+"/24", "dev", "eth0")
	a.Must("ip", "addr", "add", "fd00:3::118/64", "dev", "eth0")
	if got := a.Ping(5, umlIts); got != 5 {
		t.Errorf("ping to Linux: %d of 5", got)
	}
	if got := a.Ping(5, "fd00:3::119"); got != 5 {
		t.Errorf("ping6 to Linux: %d of 5", got)
	}
	l.Sh("ping -n -q -c 3 -i 0.1 -W 2 " + umlOur)

	for _, tt := range []struct {
		name, linux string
		scapy       string
		key         lab.Key
	}{
		{
			"AES-CBC SHA1", "enc 'cbc(aes)' 0x" + key16 + " auth-trunc 'hmac(sha1)' 0x" + key20 + " 96",
			"crypt_algo='AES-CBC', crypt_key=H('" + key16 + "'), auth_algo='HMAC-SHA1-96', auth_key=H('" + key20 + "')",
			lab.Key{Encr: lab.WiresharkAESCBC, EncrKey: unhex(t, key16), Auth: lab.WiresharkSHA1, AuthKey: unhex(t, key20)},
		},
		{
			"AES-GCM", "aead 'rfc4106(gcm(aes))' 0x" + key16 + salt + " 128",
			"crypt_algo='AES-GCM', crypt_key=H('" + key16 + salt + "')",
			lab.Key{Encr: lab.WiresharkAESGCM16, EncrKey: unhex(t, key16+salt), Auth: lab.WiresharkNULL},
		},
	} {
		for _, mode := range []string{"transport", "tunnel"} {
			t.Run(tt.name+" "+mode, func(t *testing.T) {
				l.Sh("ip xfrm state flush; ip xfrm policy flush")
				l.AddSA(lab.XfrmSA{Src: umlOur, Dst: umlIts, SPI: 0x1001, Mode: mode, Algo: tt.linux, More: "replay-window 64"})
				l.AddSA(lab.XfrmSA{Src: umlIts, Dst: umlOur, SPI: 0x1002, Mode: mode, Algo: tt.linux})
				l.AddPolicy("in", umlOur, umlIts, "proto icmp", mode, umlOur, umlIts)
				l.AddPolicy("out", umlIts, umlOur, "proto icmp", mode, umlIts, umlOur)
				c := a.CaptureWhole("eth0")
				out := a.Python(scapyEcho, "0x1001", "0x1002", mode, tt.scapy)
				if strings.TrimSpace(out) != "echo-reply 7 from 192.168.3.119" {
					t.Errorf("scapy opened: %q", out)
				}
				ps := c.Stop()
				esp := lab.Of(ps, lab.ESP)
				if len(esp) != 2 || esp[0].SPI != 0x1001 || esp[1].SPI != 0x1002 {
					t.Fatalf("captured %v", ps)
				}
				k := tt.key
				k.Src, k.Dst, k.SPI = netip.MustParseAddr(umlIts), netip.MustParseAddr(umlOur), 0x1002
				good := ""
				if k.Auth != lab.WiresharkNULL {
					good = "esp.icv_good == 1 && "
				}
				// Not the unreachable message, which quotes the packet.
				rows := lab.Decrypt(t, c.Path, []lab.Key{k}, good+"icmp.type == 0 && !(icmp.type == 3)", "esp.spi", "icmp.seq")
				if len(rows) != 1 || rows[0][0] != "0x00001002" || !strings.HasPrefix(rows[0][1], "7") {
					t.Errorf("tshark opened %q", rows)
				}
			})
		}
	}
	if n := l.XfrmStat("XfrmInStateProtoError"); n != 0 {
		t.Errorf("XfrmInStateProtoError %d, want 0", n)
	}
	l.Stop()
}

// scapyEcho sends an echo request in ESP and opens the answer. The kernel's
// own "protocol unreachable" is of no concern.
const scapyEcho = `
import sys
from scapy.all import *
from scapy.layers.ipsec import SecurityAssociation, ESP
conf.verb = 0
H = bytes.fromhex
us, it = "192.168.3.118", "192.168.3.119"
mode = sys.argv[3]
def sa(spi, src, dst):
    tun = dict(tunnel_header=IP(src=src, dst=dst)) if mode == "tunnel" else {}
    return eval("SecurityAssociation(ESP, spi=spi, %s, **tun)" % sys.argv[4])
out, back = sa(int(sys.argv[1], 0), us, it), sa(int(sys.argv[2], 0), it, us)
pkt = out.encrypt(IP(src=us, dst=it)/ICMP(id=1, seq=7)/b"0123456789")
mac = getmacbyip(it)
ans = srp1(Ether(dst=mac)/pkt, iface="eth0", timeout=5, filter="ip proto 50 and src host " + it)
if ans is None:
    sys.exit("no answer")
p = back.decrypt(IP(bytes(ans[IP])))
print(p[ICMP].sprintf("%ICMP.type%"), p[ICMP].seq, "from", p.src)
`
