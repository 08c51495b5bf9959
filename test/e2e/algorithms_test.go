package e2e

import (
	"bytes"
	"crypto/cipher"
	"crypto/des"
	"crypto/md5"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// TestLinuxAlgorithms: every cipher and integrity algorithm by manual keys that
// a Linux kernel has as well, beside those of TestLinuxAH and TestLinuxKernel, in both
// directions, transport and tunnel.
func TestLinuxAlgorithms(t *testing.T) {
	n, l := wireLab(t)
	l.Sh(`cd /usr/lib/uml/modules/$(uname -r)/kernel
		for m in lib/crypto/libdes crypto/des_generic crypto/ctr crypto/ccm crypto/gcm crypto/authenc crypto/cbc; do
			insmod $m.ko 2>&1 || grep -q "^$(basename $m | tr - _) " /proc/modules || true
		done`)
	esp := func(encr uint8, key, linux string) xform {
		return xform{proto: "esp", encr: encr, encrKey: key, linux: linux}
	}
	aead := func(encr uint8, octets int, name string, bits int) xform {
		k := rep(octets)
		return esp(encr, k, fmt.Sprintf("aead '%s' 0x%s %d", name, k, bits))
	}
	// with adds integrity to a cipher.
	with := func(x xform, auth uint8, octets int, name string, bits int) xform {
		k := rep(octets)
		x.auth, x.authKey = auth, k
		x.linux = fmt.Sprintf("auth-trunc '%s' 0x%s %d %s", name, k, bits, x.linux)
		return x
	}
	enc := func(encr uint8, octets int, name string) xform {
		k := rep(octets)
		return esp(encr, k, fmt.Sprintf("enc '%s' 0x%s", name, k))
	}
	const rfc3686, md5 = "rfc3686(ctr(aes))", "hmac(md5)"
	for i, tt := range []struct {
		name string
		kind lab.Kind
		x    xform
	}{
		{"AES-CTR-128 SHA256", lab.ESP, with(enc(13, 20, rfc3686), 5, 32, "hmac(sha256)", 128)},
		{"AES-CTR-192 SHA1", lab.ESP, with(enc(13, 28, rfc3686), 3, 20, "hmac(sha1)", 96)},
		{"AES-CTR-256 SHA512", lab.ESP, with(enc(13, 36, rfc3686), 7, 64, "hmac(sha512)", 256)},
		{"AES-CCM-8 128", lab.ESP, aead(14, 19, "rfc4309(ccm(aes))", 64)},
		{"AES-CCM-12 192", lab.ESP, aead(15, 27, "rfc4309(ccm(aes))", 96)},
		{"AES-CCM-16 256", lab.ESP, aead(16, 35, "rfc4309(ccm(aes))", 128)},
		{"NULL AES-GMAC-128", lab.ESP, aead(23, 20, "rfc4543(gcm(aes))", 128)},
		{"NULL AES-GMAC-192", lab.ESP, aead(23, 28, "rfc4543(gcm(aes))", 128)},
		{"NULL AES-GMAC-256", lab.ESP, aead(23, 36, "rfc4543(gcm(aes))", 128)},
		{"DES MD5", lab.ESP, with(enc(2, 8, "cbc(des)"), 2, 16, md5, 96)},
		{"3DES MD5", lab.ESP, with(enc(3, 24, "cbc(des3_ede)"), 2, 16, md5, 96)},
		{"3DES SHA1", lab.ESP, with(enc(3, 24, "cbc(des3_ede)"), 3, 20, "hmac(sha1)", 96)},
		{"AES-CBC MD5", lab.ESP, with(enc(12, 16, "cbc(aes)"), 2, 16, md5, 96)},
		{"AH MD5", lab.AH, ahOf("", md5, 2, 16, 96)},
	} {
		if r := l.Run("ip xfrm state flush; ip xfrm state add src 192.0.2.1 dst 192.0.2.2 proto " + tt.x.proto + " spi 0x900 mode transport " + tt.x.linux); r.Code != 0 {
			t.Run(tt.name, func(t *testing.T) { t.Skipf("this kernel has it not: %s", strings.TrimSpace(r.Out)) })
			continue
		}
		// Families and modes are TestLinuxAH's matter; here they take turns.
		for _, v := range []struct {
			name, mode string
			sh         shape
			esn        bool
		}{{"transport", "transport", [2]shape{host4, host6}[i%2], false}, {"tunnel ESN", "tunnel", [4]shape{net6, net4, net6in, net4in}[i%4], true}} {
			t.Run(tt.name+" "+v.name, func(t *testing.T) {
				n.StartMissiu("--allow-legacy")
				defer n.StopMissiu()
				x := tt.x
				x.mode = v.mode
				connect(t, n, l, v.sh, v.esn, x)
				c := n.CaptureWhole("eth0")
				for _, size := range []string{"21", "1300"} {
					if got := n.Ping(3, "-w", "60", "-s", size, v.sh.itsHost); got < 3 {
						t.Errorf("%d of 3 pings of %s octets answered by Linux; its counters:\n%s\nours: %v", got, size, l.Sh("cat /proc/net/xfrm_stat"), n.Status().Counters)
					}
					if r := l.Run(fmt.Sprintf("ping -n -q -c 3 -i 0.05 -w 60 -s %s -I %s %s", size, v.sh.itsHost, v.sh.ourHost)); r.Code != 0 {
						t.Errorf("Linux, %s octets: %v", size, r)
					}
				}
				ps := c.Stop()
				lab.NoClear(t, ps)
				if of := lab.Of(ps, tt.kind); len(of) < 24 {
					t.Errorf("on the link: %v; want at least 24 %v", lab.Count(ps), tt.kind)
				}
				noneDropped(t, n, l)
			})
		}
	}
}

const (
	oldDES  = "133457799bbcdff1"
	old3DES = oldDES + "0e329232ea6d0d73"
	old3    = old3DES + "8787878787878786"
)

// TestOldHeaders: the transforms of 1995 between two of ours, which are the last
// who speak them, and what is on the wire: the AH of RFC 1826 and the ESP of RFC
// 1827, taken apart here with crypto/des and crypto/md5 alone.
func TestOldHeaders(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	both := []*lab.Node{a, b}
	esp := func(name, key string) func(src, dst *lab.Node, spi, mode string) string {
		return func(src, dst *lab.Node, spi, mode string) string {
			return fmt.Sprintf("add esp spi %s src %v dst %v mode %s encr_alg %s encrkey %s\n", spi, src.Addr, dst.Addr, mode, name, key)
		}
	}
	// Without the operator's word there are none, and what is refused says why.
	a.StartMissiu("--allow-unauthenticated")
	a.WriteFile("bin/private", esp("des-iv64", oldDES)(a, b, "0x1001", "transport"), 0o600)
	if r := a.Try("./loadConfig --allow-unauthenticated -k private"); r.Code != 1 || !strings.Contains(r.Out+r.Err, "--allow-legacy") || len(a.SAs()) != 0 {
		t.Errorf("DES of RFC 1829 without --allow-legacy: %v", r)
	}
	a.StopMissiu()
	a.StartMissiu("--allow-legacy")
	if r := a.Try("./loadConfig --allow-unauthenticated -k private"); r.Code != 1 || len(a.SAs()) != 0 {
		t.Errorf("DES of RFC 1829 without --allow-unauthenticated: %v", r)
	}
	a.StopMissiu()

	for _, tt := range []struct {
		name, key string
		ivLen     int
	}{{"des-iv64", oldDES, 8}, {"des-iv32", oldDES, 4}, {"3des-iv64", old3, 8}, {"3des-iv32", old3, 4}, {"3des-iv64", old3DES, 8}, {"3des-iv32", old3DES, 4}} {
		for _, mode := range []string{"transport", "tunnel"} {
			t.Run(fmt.Sprintf("%s key of %d bits %s", tt.name, len(tt.key)*4, mode), func(t *testing.T) {
				for _, n := range both {
					n.StartMissiu("--allow-legacy", "--allow-unauthenticated")
					defer n.StopMissiu()
					n.Route()
					tunnel := ""
					if mode == "tunnel" {
						tunnel = fmt.Sprintf(" tladdr %v traddr %v", n.Addr, n.Peer)
					}
					n.LoadConfig(policyFor(n, "", "encr_algs "+tt.name+tunnel))
					add := esp(tt.name, tt.key)
					loadPrivate(n, "--allow-unauthenticated -k", add(a, b, "0x1001", mode)+add(b, a, "0x1002", mode))
				}
				c := a.CaptureWhole("eth0")
				pings(t, a, 5)
				pings(t, b, 5)
				// Saved, flushed, read again.
				a.Do("./loadConfig -s saved && ./loadConfig -F && ./loadConfig --allow-unauthenticated -k saved && rm saved")
				pings(t, a, 3)
				ps := c.Stop()
				lab.NoClear(t, ps)
				if got := a.Ping(3, "-w", "60", "-s", "4000", b.Addr.String()); got < 3 {
					t.Errorf("%d of 3 large pings answered; %v, %v", got, a.Status().Counters, b.Status().Counters)
				}
				of := lab.Of(ps, lab.ESP)
				if len(of) != 26 {
					t.Fatalf("on the link: %v, want 26 ESP", lab.Count(ps))
				}
				seen := map[string]bool{}
				for _, p := range of {
					e := p.Frame[p.L4:p.Len]
					iv, ct := e[4:4+tt.ivLen], e[4+tt.ivLen:]
					if seen[string(iv)] {
						t.Errorf("IV %x twice", iv)
					}
					seen[string(iv)] = true
					if spi := binary.BigEndian.Uint32(e); spi != 0x1001 && spi != 0x1002 || len(ct)%8 != 0 {
						t.Fatalf("%v: %x", p, e)
					}
					plain := openDES(t, tt.key, iv, ct)
					next := plain[len(plain)-1]
					inner := plain[:len(plain)-2-int(plain[len(plain)-2])]
					if mode == "tunnel" {
						if next != 4 || inner[0] != 0x45 || int(binary.BigEndian.Uint16(inner[2:])) != len(inner) {
							t.Fatalf("%v holds protocol %d, %x; want an IPv4 packet", p, next, inner)
						}
						inner, next = inner[20:], inner[9]
					}
					if next != 1 || inner[0] != 0 && inner[0] != 8 || len(inner) != 64 {
						t.Fatalf("%v holds protocol %d, %x; want an echo of 64 octets", p, next, inner)
					}
				}
				for _, n := range both {
					if d := n.Status().Drops(); d != 0 {
						t.Errorf("%s dropped %d: %v", n.Name, d, n.Status().Counters)
					}
				}
			})
		}
	}

	for _, mode := range []string{"transport", "tunnel"} {
		t.Run("keyed-md5 "+mode, func(t *testing.T) {
			for _, n := range both {
				n.StartMissiu("--allow-legacy")
				defer n.StopMissiu()
				n.Route()
				tunnel := ""
				if mode == "tunnel" {
					tunnel = fmt.Sprintf(" tladdr %v traddr %v", n.Addr, n.Peer)
				}
				n.LoadConfig(policyFor(n, "", "auth_algs keyed-md5"+tunnel))
				loadPrivate(n, "-k", oldAH(a, b, "0x1001", mode)+oldAH(b, a, "0x1002", mode))
			}
			c := a.CaptureWhole("eth0")
			pings(t, a, 5)
			pings(t, b, 5)
			ps := c.Stop()
			lab.NoClear(t, ps)
			of := lab.Of(ps, lab.AH)
			if len(of) != 20 {
				t.Fatalf("on the link: %v, want 20 AH", lab.Count(ps))
			}
			for _, p := range of {
				next := byte(1)
				if mode == "tunnel" {
					next = 4
				}
				verifyOldAH(t, p, next)
			}
			// The digest covers the type of service and, put together, fragments.
			if got := a.Ping(3, "-w", "60", "-s", "4000", "-Q", "0x28", b.Addr.String()); got < 3 {
				t.Errorf("%d of 3 large pings answered; %v, %v", got, a.Status().Counters, b.Status().Counters)
			}
			// A stranger's eyes: 24 octets of AH, the ICMP behind them.
			want := "4\t1"
			if mode == "tunnel" {
				want = "4\t4"
			}
			out, err := exec.Command("tshark", "-r", c.Path, "-Y", "ah", "-T", "fields", "-e", "ah.length", "-e", "ah.next_header").Output()
			if err != nil {
				t.Fatalf("tshark: %v", err)
			}
			for _, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
				if line != want {
					t.Errorf("tshark reads %q, want %q", line, want)
				}
			}
			for _, n := range both {
				if d := n.Status().Drops(); d != 0 {
					t.Errorf("%s dropped %d: %v", n.Name, d, n.Status().Counters)
				}
			}
		})
	}
}

// TestXKernelRow: DES and triple DES of 1995 inside the AH of 1995, by a policy
// file alone, which is how the x-kernel was set up.
func TestXKernelRow(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	both := []*lab.Node{a, b}
	for _, n := range both {
		n.StartMissiu("--allow-legacy", "--allow-unauthenticated")
		defer n.StopMissiu()
		n.Route()
		text := policyFor(n, "", "auth_algs keyed-md5 encr_algs 3des-iv64")
		for _, dir := range []struct {
			src, dst *lab.Node
			spi      string
		}{{a, b, "0x1001"}, {b, a, "0x1002"}} {
			text += fmt.Sprintf("add %v %v esp %s -m transport -E 3des-iv64 0x%s;\n", dir.src.Addr, dir.dst.Addr, dir.spi, old3DES)
			text += fmt.Sprintf("add %v %v ah %s -m transport -A keyed-md5 0x%s;\n", dir.src.Addr, dir.dst.Addr, dir.spi, key16)
		}
		loadPrivate(n, "--allow-unauthenticated -f", text)
	}
	c := a.CaptureWhole("eth0")
	pings(t, a, 5)
	pings(t, b, 5)
	ps := c.Stop()
	lab.NoClear(t, ps)
	of := lab.Of(ps, lab.AH)
	if len(of) != 20 {
		t.Fatalf("on the link: %v, want 20 AH", lab.Count(ps))
	}
	for _, p := range of {
		verifyOldAH(t, p, 50)
		e := p.Frame[14+20+24 : p.Len]
		plain := openDES(t, old3DES, e[4:12], e[12:])
		if n := len(plain); plain[n-1] != 1 || n-2-int(plain[n-2]) != 64 {
			t.Errorf("%v holds %x, want an echo of 64 octets", p, plain)
		}
	}
	for _, n := range both {
		if d := n.Status().Drops(); d != 0 {
			t.Errorf("%s dropped %d: %v", n.Name, d, n.Status().Counters)
		}
	}
	// What was altered on the way does not pass, and is counted.
	toA := slices.IndexFunc(of, func(p lab.Packet) bool { return p.Dst == a.Addr })
	b.Python(`
import socket, sys
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
f = bytearray.fromhex(sys.argv[1])
f[-1] ^= 1
s.send(f)
`, hex.EncodeToString(of[toA].Frame))
	lab.Until(t, 5*time.Second, "the altered packet to be refused", func() (bool, string) {
		s := a.Status()
		return s.Drops() > 0, fmt.Sprint(s.Counters)
	})
}

// oldAH is an SA of RFC 1828 in a key file.
func oldAH(src, dst *lab.Node, spi, mode string) string {
	return fmt.Sprintf("add ah spi %s src %v dst %v mode %s auth_alg keyed-md5 authkey %s\n", spi, src.Addr, dst.Addr, mode, key16)
}

// verifyOldAH wants the AH of RFC 1826 over IPv4 with the digest of RFC 1828,
// and next behind it.
func verifyOldAH(t *testing.T, p lab.Packet, next byte) {
	t.Helper()
	ip := bytes.Clone(p.Frame[14:p.Len])
	h := ip[20:44] // next, length in words, reserved, SPI, digest
	if want := []byte{next, 4, 0, 0, 0, 0, 0x10}; !bytes.Equal(h[:7], want) {
		t.Fatalf("%v: AH begins with %x, want %x", p, h[:7], want)
	}
	digest := bytes.Clone(h[8:])
	clear(h[8:])
	ip[8], ip[10], ip[11] = 0, 0, 0 // TTL, checksum
	key, fill := unhex(t, key16), make([]byte, 48)
	fill[0], fill[40] = 0x80, 128
	if sum := md5.Sum(bytes.Join([][]byte{key, fill, ip, key}, nil)); !bytes.Equal(sum[:], digest) {
		t.Errorf("%v: digest %x, want %x", p, digest, sum)
	}
}

// openDES decrypts with a key of one, two or three keys (RFC 1829, RFC 1851).
func openDES(t *testing.T, key string, iv, ct []byte) []byte {
	t.Helper()
	k := unhex(t, key)
	var b cipher.Block
	var err error
	switch len(k) {
	case 8:
		b, err = des.NewCipher(k)
	case 16:
		b, err = des.NewTripleDESCipher(append(k, k[:8]...))
	default:
		b, err = des.NewTripleDESCipher(k)
	}
	if err != nil {
		t.Fatal(err)
	}
	whole := bytes.Clone(iv)
	for len(whole) < 8 {
		whole = append(whole, ^iv[len(whole)-4])
	}
	out := make([]byte, len(ct))
	cipher.NewCBCDecrypter(b, whole).CryptBlocks(out, ct)
	return out
}
