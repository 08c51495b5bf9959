package ike

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/missiu/missiu/pkg/ipsec"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// Journal is a file that says which SAs in missiu, and which addresses of its
// device, are ours, so that an ike that follows one that was killed can remove what
// that one left: nobody would rekey those SAs, and the peer, which finds out that
// the IKE SA is gone, drops its ends of them and may assign another address. There
// are no keys in it.
//
// A line each, "+" for what is about to be there and "-" for what is gone; what
// was added and not taken away is there:
//
//   - esp 192.0.2.2 192.0.2.1 0xc0ffee00
//   - addr 10.9.0.1
//   - esp 192.0.2.2 192.0.2.1 0xc0ffee00
//
// of an SA in the order protocol, source, destination, SPI. It is written anew
// when most of it is history. Whoever writes it holds a lock on it (flock): a second
// ike, that is about to find its port in use, must not take it away from the first.
type Journal struct {
	path  string
	mu    sync.Mutex
	f     *os.File
	left  []installed // by whoever wrote it before
	live  map[ipsec.SAID]netip.Addr
	addrs map[netip.Addr]bool
	lines int
	err   error // the first: then nothing is written any more
}

// maxJournal bounds what is read of a journal, in lines.
const maxJournal = 4 << 20

// OpenJournal opens or makes the journal at path. A file that is not the caller's own, or that another process
// writes, is refused; what cannot be understood in it is passed over.
func OpenJournal(path string) (*Journal, error) {
	f, err := lockJournal(path)
	if err != nil {
		return nil, err
	}
	j := &Journal{path: path, f: f}
	j.live, j.addrs = readJournal(f)
	for id, src := range j.live {
		j.left = append(j.left, installed{id, src})
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.rewrite()
	return j, j.err
}

// lockJournal opens the file that is at path once it has the lock.
func lockJournal(path string) (*os.File, error) {
	for {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		f := os.NewFile(uintptr(fd), path)
		var st, now unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0 {
			f.Close()
			return nil, fmt.Errorf("%s: not a file of ours alone", path)
		}
		if err := lock(f); err != nil {
			f.Close()
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if unix.Lstat(path, &now) == nil && now.Ino == st.Ino && now.Dev == st.Dev {
			return f, nil
		}
		f.Close() // it was written anew, or removed, meanwhile
	}
}

func lock(f *os.File) error {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return errors.New("another ike that runs writes it")
	}
	return err
}

func readJournal(r io.Reader) (live map[ipsec.SAID]netip.Addr, addrs map[netip.Addr]bool) {
	live, addrs = map[ipsec.SAID]netip.Addr{}, map[netip.Addr]bool{}
	s := bufio.NewScanner(r)
	for n := 0; n < maxJournal && s.Scan(); n++ {
		w := strings.Fields(s.Text())
		if len(w) == 3 && w[1] == addrWord {
			if a, err := netip.ParseAddr(w[2]); err == nil && w[0] == "+" {
				addrs[a] = true
			} else {
				delete(addrs, a)
			}
			continue
		}
		if len(w) != 5 {
			continue
		}
		src, err1 := netip.ParseAddr(w[2])
		dst, err2 := netip.ParseAddr(w[3])
		spi, err3 := strconv.ParseUint(w[4], 0, 32)
		id := ipsec.SAID{Dst: dst, SPI: ipsec.SPI(spi)}
		switch w[1] {
		case ipsec.ESP.String():
			id.Proto = ipsec.ESP
		case ipsec.AH.String():
			id.Proto = ipsec.AH
		}
		if errors.Join(err1, err2, err3) != nil || id.Proto == 0 {
			continue
		}
		if w[0] == "+" {
			live[id] = src
		} else {
			delete(live, id)
		}
	}
	return live, addrs
}

const addrWord = "addr"

// addAddr is called before missiu's device is given an address.
func (j *Journal) addAddr(a netip.Addr) {
	if j == nil {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.addrs[a] = true
	j.write("+ " + addrWord + " " + a.String() + "\n")
}

// removeAddr is called after it was taken away.
func (j *Journal) removeAddr(a netip.Addr) {
	if j == nil {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.addrs[a] {
		delete(j.addrs, a)
		j.write("- " + addrWord + " " + a.String() + "\n")
	}
}

func (j *Journal) line(sign string, id ipsec.SAID, src netip.Addr) string {
	return fmt.Sprintf("%s %v %v %v 0x%08x\n", sign, id.Proto, src, id.Dst, uint32(id.SPI))
}

// add is called before an SA is installed.
func (j *Journal) add(i installed) error {
	if j == nil {
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.live[i.id] = i.src
	j.write(j.line("+", i.id, i.src))
	return j.err
}

// remove is called after an SA is gone.
func (j *Journal) remove(id ipsec.SAID) {
	if j == nil {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	src, ok := j.live[id]
	if !ok {
		return
	}
	delete(j.live, id)
	j.write(j.line("-", id, src))
}

func (j *Journal) write(s string) {
	if j.err != nil {
		return
	}
	if j.lines > 1000+4*(len(j.live)+len(j.addrs)) {
		j.rewrite()
		return
	}
	_, j.err = j.f.WriteString(s)
	j.lines++
}

// rewrite replaces the file by one that says no more than what is there.
func (j *Journal) rewrite() {
	tmp := j.path + "~"
	j.err = os.Remove(tmp)
	if errors.Is(j.err, os.ErrNotExist) {
		j.err = nil
	}
	if j.err != nil {
		return
	}
	f, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		j.err = err
		return
	}
	w := bufio.NewWriter(f)
	for id, src := range j.live {
		w.WriteString(j.line("+", id, src))
	}
	for a := range j.addrs {
		w.WriteString("+ " + addrWord + " " + a.String() + "\n")
	}
	if err := errors.Join(w.Flush(), lock(f), os.Rename(tmp, j.path)); err != nil {
		f.Close()
		os.Remove(tmp)
		j.err = err
		return
	}
	j.f.Close()
	j.f, j.lines = f, len(j.live)+len(j.addrs)
}

// Close closes the file, and removes it if nothing of ours is in missiu.
func (j *Journal) Close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.live)+len(j.addrs) == 0 {
		os.Remove(j.path)
	}
	return j.f.Close()
}

// JournalPath is where the journal of the daemon with first address a is, in the
// directory dir.
func JournalPath(dir string, a netip.Addr) string { return filepath.Join(dir, a.String()+".sas") }

// inherit takes over what a dead ike left: its SAs are removed as soon as missiu
// is there, and their peers are asked for new ones, which also tells them, by
// INITIAL_CONTACT, that what they have is stale.
func (d *Daemon) inherit() {
	if d.cfg.Journal == nil {
		return
	}
	d.staleIPs = slices.Collect(maps.Keys(d.cfg.Journal.addrs))
	left := d.cfg.Journal.left
	if len(left) == 0 {
		return
	}
	d.log.Warn("an ike before us was killed; the SAs that it left are replaced", zap.Int("count", len(left)))
	d.stale = append(d.stale, left...)
	for _, i := range left {
		local, remote := i.src, i.id.Dst
		if d.isLocal(local) {
			d.addStarter(local, remote, false)
		}
	}
}

func (d *Daemon) isLocal(a netip.Addr) bool { return slices.Contains(d.cfg.Local, a) }
