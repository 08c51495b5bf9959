package ike

import (
	"bufio"
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/missiu/missiu/pkg/ike/sa"
	"go.uber.org/zap"
)

// dnsFiles are the files that rules have name servers written to, in the format
// of resolv.conf(5): each is there as long as an IKE SA has name servers for it,
// and always whole, since it is written beside its place and moved there.
type dnsFiles struct {
	mu    sync.Mutex
	users map[string][]dnsUser // by file, in the order they came
}

// dnsUser is an IKE SA with name servers.
type dnsUser struct {
	l     *lineage
	label string
	peer  netip.Addr
	lease sa.Lease
}

// dnsMark begins every file of ours.
const dnsMark = "# written by ike(8), which removes it\n"

// dnsText is a file's content. Two IKE SAs of one peer, of which one replaces the
// other, say a thing only once.
func dnsText(us []dnsUser) []byte {
	b := bytes.NewBufferString(dnsMark)
	var servers []netip.Addr
	var domains []string
	var split []string // comments
	for _, u := range us {
		// %q: a label may hold what ends a line, or not.
		about := fmt.Sprintf("# rule %q, peer %v:", u.label, u.peer)
		for _, a := range u.lease.DNS {
			about += " " + a.String()
			if !slices.Contains(servers, a) {
				servers = append(servers, a)
			}
		}
		if len(u.lease.Domains) > 0 {
			about += " for " + strings.Join(u.lease.Domains, " ")
		}
		for _, d := range u.lease.Domains {
			if !slices.Contains(domains, d) {
				domains = append(domains, d)
			}
		}
		if !slices.Contains(split, about) {
			split = append(split, about)
		}
	}
	for _, s := range split {
		fmt.Fprintln(b, s)
	}
	for _, a := range servers {
		fmt.Fprintln(b, "nameserver", a)
	}
	if len(domains) > 0 {
		fmt.Fprintln(b, "search", strings.Join(domains, " "))
	}
	return b.Bytes()
}

// add has the name servers of u written to file.
func (f *dnsFiles) add(file string, u dnsUser) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.users == nil {
		f.users = map[string][]dnsUser{}
	}
	f.users[file] = append(f.users[file], u)
	return f.write(file)
}

// remove takes what l has there out of file.
func (f *dnsFiles) remove(file string, l *lineage) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.users[file] = slices.DeleteFunc(f.users[file], func(u dnsUser) bool { return u.l == l })
	return f.write(file)
}

func (f *dnsFiles) write(file string) error {
	us := f.users[file]
	if len(us) == 0 {
		delete(f.users, file)
		return removeDNSFile(file)
	}
	t, err := os.CreateTemp(filepath.Dir(file), ".ike-dns-*")
	if err != nil {
		return err
	}
	defer os.Remove(t.Name())
	_, err = t.Write(dnsText(us))
	if err == nil {
		err = t.Chmod(0o644)
	}
	if cerr := t.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	return os.Rename(t.Name(), file)
}

// removeDNSFile removes a file of ours, and none that somebody else has put in
// its place.
func removeDNSFile(file string) error {
	f, err := os.Open(file)
	if err != nil {
		if os.IsNotExist(err) {
			return nil
		}
		return err
	}
	line, _ := bufio.NewReader(f).ReadString('\n')
	f.Close()
	if line != dnsMark {
		return nil
	}
	return os.Remove(file)
}

// dnsUp writes the name servers that the peer has assigned.
func (l *lineage) dnsUp() {
	r := l.sa.Rule()
	if r == nil || r.DNSFile == "" || len(l.given.DNS) == 0 {
		return
	}
	l.dnsFile = r.DNSFile
	l.dnsTold(l.d.dns.add(l.dnsFile, dnsUser{l, r.Label, l.remote.Addr(), l.given}))
}

// dnsDown takes them away.
func (l *lineage) dnsDown() {
	if l.dnsFile != "" {
		l.dnsTold(l.d.dns.remove(l.dnsFile, l))
		l.dnsFile = ""
	}
}

func (l *lineage) dnsTold(err error) {
	if err != nil {
		l.log.Warn("dns_file not written", zap.String("file", l.dnsFile), zap.Error(err))
	}
}

// leftDNSFiles removes those that an ike which was killed has left.
func (d *Daemon) leftDNSFiles() {
	for _, r := range d.rules.Load().Rules() {
		if r.DNSFile == "" {
			continue
		}
		if err := removeDNSFile(r.DNSFile); err != nil {
			d.log.Warn("dns_file not removed", zap.String("file", r.DNSFile), zap.Error(err))
		}
	}
}
