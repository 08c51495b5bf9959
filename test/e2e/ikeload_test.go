package e2e

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/ike/cred/credtest"
	"github.com/missiu/missiu/test/e2e/lab"
)

// TestIKELoad measures how ike carries many peers, beside charon under the same
// load: set-ups by processor time of the responder, memory for an IKE SA, and
// what a flood of half-open requests does to those who are there. `make bench-ike`
// runs it with the numbers that count; else it is small, so that it does not rot.
// Peers prove themselves by a pre-shared key; with BENCH_IKE_AUTH=ecdsa by
// certificates with keys of ECDSA P-256, as the responder then does.
func TestIKELoad(t *testing.T) {
	lab.NeedRoot(t)
	n, rules, flood := 300, 1000, 2000
	floodTime := 3 * time.Second
	if s := os.Getenv("BENCH_IKE"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
		rules, flood, floodTime = 10000, 10000, 10*time.Second
	}
	var ours, theirs loaded
	rule, conn := "auth_method preshared remote_addr any remote_id IP=0.0.0.0/0", "remote {\nauth = psk\nid = %any\n}\n"
	var issuer, own *credtest.Cert
	switch auth := os.Getenv("BENCH_IKE_AUTH"); auth {
	case "", "psk":
	case "ecdsa":
		issuer = credtest.CA("CA", credtest.Key("p256", 2))
		own = issuer.Issue("responder", credtest.Key("p256", 1), credtest.Names("responder.example.com"))
		rule = `auth_method cert remote_addr any cert_file "own.pem" key_file "own.key" ca_file "ca.pem" local_id responder.example.com remote_id *.example.com`
		conn = "local {\nauth = pubkey\ncerts = own.pem\nid = responder.example.com\n}\nremote {\nauth = pubkey\nid = %any\n}\n"
	default:
		t.Fatalf("BENCH_IKE_AUTH=%s: want psk or ecdsa", auth)
	}
	// put writes what the two ends have to prove themselves by.
	put := func(h, loader *lab.Host, cert, key, ca string) {
		if issuer == nil {
			return
		}
		h.WriteFile(ca, string(credtest.PEM(issuer)), 0o644)
		h.WriteFile(cert, string(credtest.PEM(own)), 0o644)
		h.WriteFile(key, string(credtest.KeyPEM(own.Key)), 0o600)
		loader.WriteFile("/etc/missiu/load.pem", string(credtest.PEM(issuer))+string(credtest.KeyPEM(issuer.Key)), 0o600)
	}
	var options []string
	if issuer != nil {
		options = append(options, "-ca", "/etc/missiu/load.pem")
	}
	t.Run("ike", func(t *testing.T) {
		a, b := lab.Pair(t)
		strangers(a, b)
		put(a.Host, b.Host, "/etc/missiu/own.pem", "/etc/missiu/own.key", "/etc/missiu/ca.pem")
		ikeLoadStart(t, a, "rule \"t\" { "+rule+" }\n")
		ours = carry(t, a.Host, b, "ike", a.IKE, n, flood, floodTime, options...)
		st := a.Do("./ike status")
		if got := strings.Count(st, "10.64."); got < n {
			t.Errorf("after the flood %d lines about %d peers", got, n)
		}
	})
	t.Run("charon", func(t *testing.T) {
		a, b := lab.Pair(t)
		strangers(b, a)
		d := &duo{t: t, a: a, b: b.Host}
		d.startCharon(`
  cookie_threshold = 0
  block_threshold = 0
  ikesa_table_size = 16384
  ikesa_table_segments = 16
  filelog {
    stderr {
      default = 1
      cfg = 1
      ike = 1
    }
  }
`)
		put(d.b, a.Host, "/etc/swanctl/x509/own.pem", "/etc/swanctl/private/own.pem", "/etc/swanctl/x509ca/ca.pem")
		d.peer("encap = no\nchildless = allow\nproposals = aes128gcm16-prfsha256-x25519\nremote_addrs = %any\n"+conn, "")
		theirs = carry(t, d.b, a, "charon", d.charon, n, 0, 0, options...)
	})
	t.Run("rules", func(t *testing.T) {
		a, _ := lab.Pair(t)
		var conf, secrets strings.Builder
		for i := range rules {
			fmt.Fprintf(&conf, "rule \"r%d\" { auth_method preshared remote_addr 10.64.%d.%d remote_id FQDN=h%d.example.com }\n", i, i>>8, i&255, i)
			fmt.Fprintf(&secrets, "{ label \"r%d\" key \"%s %[1]d\" }\n", i, lab.PSK)
		}
		a.StartMissiu()
		a.WriteFile("/etc/missiu/ike.conf", conf.String(), 0o644)
		a.WriteFile("/etc/missiu/ike.secrets", secrets.String(), 0o600)
		start := time.Now()
		a.Do("./ike -n " + a.Addr.String())
		checked := time.Since(start)
		start = time.Now()
		a.StartIKEWith("./ike")
		started := time.Since(start)
		t.Logf("%d rules: checked in %v, ready in %v", rules, checked, started)
		if checked > 20*time.Second || started > 20*time.Second { // a few hundredths where nothing else runs
			t.Errorf("%d rules take %v to check, %v to start with; want less than 20 s", rules, checked, started)
		}
	})
	if ours.cpu > 0 && theirs.cpu > 0 {
		t.Logf("set-ups per second of processor time: ike %.0f, charon %.0f, ratio %.2f", float64(n)/ours.cpu, float64(n)/theirs.cpu, theirs.cpu/ours.cpu)
	}
}

// strangers gives the loader's addresses to b, and tells a the way to them.
func strangers(a, b *lab.Node) {
	b.Must("ip", "route", "add", "local", "10.64.0.0/16", "dev", "lo")
	a.Must("ip", "route", "add", "10.64.0.0/15", "via", b.Addr.String())
}

func ikeLoadStart(t *testing.T, a *lab.Node, conf string) {
	t.Helper()
	d := &duo{t: t, a: a}
	a.StartMissiu()
	d.startIKE("cookie_threshold 32\nhalf_open_limit 1024\n"+conf, lab.PSK)
}

// loaded is what the load costs a responder.
type loaded struct{ cpu, seconds float64 }

// carry has n peers on b set up IKE SAs with h, whose daemon is p, and then sends
// flood half-open requests a second for floodTime; 0: none.
func carry(t *testing.T, h *lab.Host, b *lab.Node, name string, p *lab.Proc, n, flood int, floodTime time.Duration, options ...string) (l loaded) {
	t.Helper()
	at := h.Name[strings.LastIndexByte(h.Name, '-')+1:]
	to := map[string]string{"a": "192.168.3.118", "b": "192.168.3.119"}[at]
	was, cpu := resident(t, p), cpuTime(t, p)
	args := append([]string{"bin/ikeload", "-n", fmt.Sprint(n), "-flood", fmt.Sprint(flood), "-for", floodTime.String()}, options...)
	q := b.Start(append(args, to, lab.PSK)...)
	q.Says("up ", 5*time.Minute)
	l.cpu = cpuTime(t, p) - cpu
	grown := resident(t, p) - was
	var up, failed int
	out := q.Output()
	if _, err := fmt.Sscanf(out[strings.Index(out, "up "):], "up %d failed %d seconds %f", &up, &failed, &l.seconds); err != nil || up != n {
		t.Fatalf("%d of %d are up (%v):\n%s", up, n, err, out)
	}
	t.Logf("%s: %d set-ups in %.2f s, %.0f a second; %.2f s of processor time; %.1f KiB resident for each", name, n, l.seconds, float64(n)/l.seconds, l.cpu, float64(grown)/float64(n)/1024)
	if flood == 0 {
		return l
	}
	q.Says("flood ", time.Minute)
	var sent, lost, asked, answered int
	out = q.Output()
	if _, err := fmt.Sscanf(out[strings.Index(out, "flood "):], "flood %d lost %d asked %d answered %d", &sent, &lost, &asked, &answered); err != nil || lost != 0 || asked == 0 || answered != asked || sent < flood*int(floodTime.Seconds())/2 {
		t.Errorf("%d half-open requests, %d of %d peers lost, %d of %d rekeyed (%v):\n%s", sent, lost, n, answered, asked, err, out)
	}
	t.Logf("%s: flood of %d half-open requests in %v: %d of %d peers lost, %d of %d rekeyed meanwhile; %.1f MiB resident", name, sent, floodTime, lost, n, answered, asked, float64(resident(t, p))/(1<<20))
	return l
}

// cpuTime is the processor time of a process so far, in seconds.
func cpuTime(t *testing.T, p *lab.Proc) float64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	return float64(user+system) / 100 // USER_HZ, which is fixed
}

// resident is the memory of a process, in octets.
func resident(t *testing.T, p *lab.Proc) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	kib := 0
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			fmt.Sscan(rest, &kib)
		}
	}
	return kib << 10
}
