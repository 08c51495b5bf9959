package apply

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"syscall"

	"github.com/missiu/missiu/pkg/config/ipseckey"
	"github.com/missiu/missiu/pkg/config/lexer"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// SASocket is what SAs uses of a keysock.Client.
type SASocket interface {
	Dump(ctx context.Context, proto ipsec.Protocol) ([]*keysock.SAInfo, error)
	Add(ctx context.Context, p *ipsec.SAParams, seq uint32) error
	Update(ctx context.Context, p *ipsec.SAParams, seq uint32) error
	Delete(ctx context.Context, id ipsec.SAID, src netip.Addr) error
}

var _ SASocket = (*keysock.Client)(nil)

// SAResult counts what commands did to SAs. Kept are those that an add command
// gives and that are there already: they are not made anew, since that would
// use their sequence numbers again.
type SAResult struct{ Added, Changed, Deleted, Kept int }

// SAs carries out the commands of a key file, all or none: what it would come to
// is found out before anything is changed, and what was added goes again when
// missiu refuses a later one. What commands print goes to out. Errors about a
// command are lexer.Messages with file and place.
func SAs(ctx context.Context, s SASocket, file string, cs []ipseckey.Command, out io.Writer) (SAResult, error) {
	p, err := planSAs(ctx, s, file, cs, out)
	if err != nil {
		return SAResult{}, err
	}
	defer p.wipe()
	if err := p.place(ctx); err != nil {
		return SAResult{}, also(err, p.undo(ctx))
	}
	return p.res, p.finish(ctx)
}

// saPlan is what commands come to.
type saPlan struct {
	s    SASocket
	file string
	res  SAResult
	was  []*keysock.SAInfo // before, for their keys and for undo
	had  map[ipsec.SAID]*keysock.SAInfo
	will map[ipsec.SAID]*wanted
	todo []*wanted // in the order of the commands
	done []*wanted // placed
}

// wanted is an SA as it is to be.
type wanted struct {
	pos     lexer.Pos
	p       *ipsec.SAParams
	info    *keysock.SAInfo // as it is; nil: new
	changed bool
}

func planSAs(ctx context.Context, s SASocket, file string, cs []ipseckey.Command, out io.Writer) (*saPlan, error) {
	was, err := s.Dump(ctx, 0)
	if err != nil {
		return nil, fmt.Errorf("reading the SAs: %w", err)
	}
	p := &saPlan{s: s, file: file, was: was, had: map[ipsec.SAID]*keysock.SAInfo{}, will: map[ipsec.SAID]*wanted{}}
	for _, i := range was {
		p.had[i.SAID] = i
		p.will[i.SAID] = &wanted{p: &i.SAParams, info: i}
	}
	for i := range cs {
		if err := p.command(&cs[i], out); err != nil {
			p.wipe()
			return nil, err
		}
	}
	return p, nil
}

func (p *saPlan) wipe() {
	for _, i := range p.was {
		i.Wipe()
	}
}

func (p *saPlan) message(pos lexer.Pos, format string, a ...any) error {
	return lexer.Message{File: p.file, Pos: pos, Text: fmt.Sprintf(format, a...)}
}

// command works on p.will.
func (p *saPlan) command(c *ipseckey.Command, out io.Writer) error {
	id := c.SA.SAID
	cur := p.will[id]
	absent := func() error { return p.message(c.Pos, "%s: there is no SA %v", c.Verb, id) }
	switch c.Verb {
	case ipseckey.Add:
		return p.add(c, cur)
	case ipseckey.Update:
		switch {
		case cur == nil:
			return absent()
		case !sameKeying(cur.p, &c.SA):
			return p.message(c.Pos, "update: keys, algorithms, mode and addresses of SA %v cannot change; delete it and add another", id)
		}
		n := &wanted{pos: c.Pos, p: &c.SA, info: cur.info, changed: true}
		if cur.info == nil {
			n.changed = false // as new as it was
		}
		p.replace(cur, n)
	case ipseckey.Delete, ipseckey.DeletePair, ipseckey.Get:
		if cur == nil || c.SA.Src.IsValid() && c.SA.Src != cur.p.Src {
			return absent()
		}
		if c.Verb == ipseckey.Get {
			return WriteSAs(out, []*keysock.SAInfo{cur.shown()})
		}
		if c.Verb == ipseckey.DeletePair {
			pair := p.opposite(cur.p)
			if len(pair) != 1 {
				return p.message(c.Pos, "delete-pair: %d SAs go the other way, want one", len(pair))
			}
			delete(p.will, pair[0].p.SAID)
		}
		delete(p.will, id)
	case ipseckey.Flush:
		for id := range p.will {
			if c.Proto == 0 || c.Proto == id.Proto {
				delete(p.will, id)
			}
		}
	case ipseckey.Dump:
		return WriteSAs(out, p.list(c.Proto))
	case ipseckey.Save:
		return SaveSAs(c.File, out, p.list(c.Proto))
	}
	return nil
}

func (w *wanted) shown() *keysock.SAInfo {
	if w.info != nil && !w.changed {
		return w.info
	}
	i := &keysock.SAInfo{SAParams: *w.p, State: keysock.Mature}
	if w.info != nil {
		i.Packets, i.Bytes, i.Added, i.FirstUsed = w.info.Packets, w.info.Bytes, w.info.Added, w.info.FirstUsed
	}
	return i
}

// list is what a dump at this place shows: what was there, then what is new.
func (p *saPlan) list(proto ipsec.Protocol) []*keysock.SAInfo {
	var l []*keysock.SAInfo
	show := func(w *wanted) {
		if w != nil && (proto == 0 || proto == w.p.Proto) && p.will[w.p.SAID] == w {
			l = append(l, w.shown())
		}
	}
	for _, i := range p.was {
		if w := p.will[i.SAID]; w != nil && w.info == i {
			show(w)
		}
	}
	for _, w := range p.todo {
		if w.info == nil {
			show(w)
		}
	}
	return l
}

func (p *saPlan) replace(old, n *wanted) {
	p.will[n.p.SAID] = n
	p.todo = append(p.todo, n)
	if old != nil {
		p.todo = slices.DeleteFunc(p.todo, func(w *wanted) bool { return w == old })
	}
}

func (p *saPlan) add(c *ipseckey.Command, cur *wanted) error {
	switch {
	case cur != nil && cur.pos.IsValid():
		return p.message(c.Pos, "add: SA %v is given twice; first at %v", c.SA.SAID, cur.pos)
	case cur != nil && !sameKeying(cur.p, &c.SA):
		return p.message(c.Pos, "add: there is another SA %v; delete it or flush first", c.SA.SAID)
	}
	n := &wanted{pos: c.Pos, p: &c.SA}
	if i := p.had[c.SA.SAID]; i != nil && sameKeying(&i.SAParams, &c.SA) && i.State != keysock.Larval {
		// Also behind a flush: see SAResult.
		n.info = i
		p.res.Kept++
	}
	p.replace(cur, n)
	if c.Pair == 0 {
		return nil
	}
	for _, o := range p.opposite(&c.SA) {
		if o.p.SPI == c.Pair {
			return nil
		}
	}
	return p.message(c.Pos, "add: pair-spi: no SA %v goes the other way", c.Pair)
}

// opposite finds the SAs that go the other way.
func (p *saPlan) opposite(a *ipsec.SAParams) (l []*wanted) {
	for _, w := range p.will {
		if b := w.p; b.Proto == a.Proto && b.Src == a.Dst && b.Dst == a.Src && b.Mode == a.Mode && b.ReqID == a.ReqID {
			l = append(l, w)
		}
	}
	return l
}

// sameKeying reports whether two SAs are one, apart from limits and UDP ports.
func sameKeying(a, b *ipsec.SAParams) bool {
	return a.SAID == b.SAID && a.Src == b.Src && a.Mode == b.Mode && a.ReqID == b.ReqID && a.ESN == b.ESN &&
		a.Encr == b.Encr && a.EncrKey.Equal(b.EncrKey) && a.Auth == b.Auth && a.AuthKey.Equal(b.AuthKey) &&
		(a.Encap == nil) == (b.Encap == nil) && slices.Equal(a.SrcTS, b.SrcTS) && slices.Equal(a.DstTS, b.DstTS)
}

// place makes what is new and changes what changes. An SA in whose place
// another one was goes first.
func (p *saPlan) place(ctx context.Context) error {
	for _, w := range p.todo {
		if p.will[w.p.SAID] != w {
			continue // deleted again
		}
		old := p.had[w.p.SAID]
		var err error
		switch {
		case w.info != nil && !w.changed:
			continue
		case w.info != nil:
			if reflect.DeepEqual(limitsOf(w.p), limitsOf(&w.info.SAParams)) {
				continue
			}
			p.res.Changed++
			err = p.s.Update(ctx, w.p, 0)
		default:
			if old != nil {
				if err = p.s.Delete(ctx, old.SAID, old.Src); err == nil || errors.Is(err, syscall.ESRCH) {
					p.res.Deleted++
					err = p.s.Add(ctx, w.p, 0)
				}
			} else {
				err = p.s.Add(ctx, w.p, 0)
			}
			p.res.Added++
		}
		if err != nil {
			return p.message(w.pos, "missiu refused SA %v: %v", w.p.SAID, err)
		}
		p.done = append(p.done, w)
	}
	return nil
}

type limits struct {
	hard, soft ipsec.Lifetime
	encap      *ipsec.Encap
}

func limitsOf(p *ipsec.SAParams) limits { return limits{p.Hard, p.Soft, p.Encap} }

// undo takes back what place did. An SA that was replaced does not come back:
// its sequence numbers have gone with it.
func (p *saPlan) undo(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	var errs []error
	for _, w := range slices.Backward(p.done) {
		var err error
		if w.info != nil {
			err = p.s.Update(ctx, &w.info.SAParams, 0)
		} else {
			err = p.s.Delete(ctx, w.p.SAID, w.p.Src)
			if p.had[w.p.SAID] != nil {
				err = errors.Join(err, fmt.Errorf("SA %v is lost: the one in its place was taken back", w.p.SAID))
			}
		}
		if err != nil && !errors.Is(err, syscall.ESRCH) {
			errs = append(errs, err)
		}
	}
	p.done = nil
	return errors.Join(errs...)
}

// finish deletes what is not to be any more, which cannot be undone.
func (p *saPlan) finish(ctx context.Context) error {
	for _, i := range p.was {
		if p.will[i.SAID] != nil {
			continue
		}
		switch err := p.s.Delete(ctx, i.SAID, i.Src); {
		case errors.Is(err, syscall.ESRCH): // gone meanwhile
		case err != nil:
			return fmt.Errorf("new SAs are in force, but %v could not be deleted: %w", i.SAID, err)
		default:
			p.res.Deleted++
		}
	}
	return nil
}

// WriteKeys writes SAs as a key file, with their keys: what cannot be read again
// as it is, larval SAs and those of counter-mode ciphers that have been used, are
// comments, of the latter without the keys.
func WriteKeys(w io.Writer, sas []*keysock.SAInfo) error {
	b := bufio.NewWriter(w)
	fmt.Fprintln(b, "# SAs with their keys; read by loadConfig -k")
	for _, i := range sas {
		if i.State == keysock.Larval {
			continue
		}
		spent := i.Encr.Info().AEAD && i.Packets > 0
		line, note := ipseckey.Format(&i.SAParams, !spent)
		if spent {
			note = "used: to begin again with its nonces would give away what it protected"
		}
		if note != "" {
			fmt.Fprintf(b, "# %s:\n# ", note)
		}
		fmt.Fprintln(b, line)
	}
	return b.Flush()
}

// SaveSAs is WriteKeys to a file that only its owner can read, in place of what
// it was; "" and "-" are out.
func SaveSAs(name string, out io.Writer, sas []*keysock.SAInfo) error {
	if name == "" || name == "-" {
		return WriteKeys(out, sas)
	}
	if i, err := os.Lstat(name); err == nil && !i.Mode().IsRegular() {
		return fmt.Errorf("%s: not a regular file", name)
	}
	f, err := os.CreateTemp(filepath.Dir(name), ".loadConfig-*") // 0600
	if err != nil {
		return err
	}
	err = WriteKeys(f, sas)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}
