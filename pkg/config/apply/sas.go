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

	"github.com/missiu/missiu/pkg/config/ipsecconf"
	"github.com/missiu/missiu/pkg/config/ipseckey"
	"github.com/missiu/missiu/pkg/config/lexer"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// SASocket is what SAs uses of a keysock.Client.
type SASocket interface {
	Begin(ctx context.Context) error
	Commit(ctx context.Context) error
	Abort(ctx context.Context) error
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

// SAs carries out the commands of a key file, all or none, in one transaction.
// What commands print goes to out. Errors about a command are lexer.Messages
// with file and place.
func SAs(ctx context.Context, s SASocket, file string, cs []ipseckey.Command, out io.Writer) (SAResult, error) {
	p, err := planSAs(ctx, s, file, cs, out)
	if err != nil {
		return SAResult{}, err
	}
	defer p.wipe()
	if !p.changes() {
		return p.res, nil
	}
	if err := begin(ctx, s); err != nil {
		return SAResult{}, err
	}
	if err := p.place(ctx); err != nil {
		return SAResult{}, also(err, wrap("abort", s.Abort(context.WithoutCancel(ctx))))
	}
	if err := s.Commit(ctx); err != nil {
		return SAResult{}, fmt.Errorf("commit: %w", err)
	}
	return p.res, nil
}

// begin opens a transaction.
func begin(ctx context.Context, s SASocket) error {
	err := s.Begin(ctx)
	if errors.Is(err, syscall.EBUSY) {
		return errors.New("another program is changing the policies; try again")
	}
	return wrap("begin", err)
}

// saPlan is what commands come to.
type saPlan struct {
	s    SASocket
	file string
	res  SAResult
	was  []*keysock.SAInfo // before, with their keys
	had  map[ipsec.SAID]*keysock.SAInfo
	will map[ipsec.SAID]*wanted
	todo []*wanted // in the order of the commands
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
	case ipseckey.Update, ipseckey.UpdatePair:
		if cur == nil || c.SA.Src.IsValid() && c.SA.Src != cur.p.Src {
			return absent()
		}
		return p.update(c, cur)
	case ipseckey.Help:
		_, err := io.WriteString(out, ipseckey.HelpText)
		return err
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
		return SaveSAs(c.File, out, p.list(c.Proto), c.HideKeys)
	}
	return nil
}

// update changes an SA and, as update-pair, the limits of the one that goes the
// other way.
func (p *saPlan) update(c *ipseckey.Command, cur *wanted) error {
	pair := p.opposite(cur.p)
	if c.Pair != 0 {
		pair = slices.DeleteFunc(pair, func(o *wanted) bool { return o.p.SPI != c.Pair })
		if len(pair) == 0 {
			return p.noPair(c)
		}
	}
	n, differs := c.Merge(cur.p)
	if differs != "" {
		return p.message(c.Pos, "%s: %s of SA %v cannot change; delete it and add another", c.Verb, differs, cur.p.SAID)
	}
	p.put(c, cur, &n)
	if c.Verb != ipseckey.UpdatePair {
		return nil
	}
	if len(pair) != 1 {
		return p.message(c.Pos, "update-pair: %d SAs go the other way, want one", len(pair))
	}
	m, _ := c.Merge(pair[0].p)
	m.Encap = pair[0].p.Encap // ports are a direction's own
	p.put(c, pair[0], &m)
	return nil
}

// put has an SA become n, which it is but for limits and ports.
func (p *saPlan) put(c *ipseckey.Command, cur *wanted, n *ipsec.SAParams) {
	p.replace(cur, &wanted{pos: c.Pos, p: n, info: cur.info, changed: cur.info != nil})
}

func (p *saPlan) noPair(c *ipseckey.Command) error {
	return p.message(c.Pos, "%s: pair-spi: no SA %v goes the other way", c.Verb, c.Pair)
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
	return p.noPair(c)
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
	return a.SAID == b.SAID && a.Src == b.Src && a.Mode == b.Mode && a.ReqID == b.ReqID && a.ESN == b.ESN && a.AggFrag == b.AggFrag &&
		a.Encr == b.Encr && a.EncrKey.Equal(b.EncrKey) && a.Auth == b.Auth && a.AuthKey.Equal(b.AuthKey) &&
		(a.Encap == nil) == (b.Encap == nil) && slices.Equal(a.SrcTS, b.SrcTS) && slices.Equal(a.DstTS, b.DstTS)
}

// changes reports whether there is anything to do.
func (p *saPlan) changes() bool {
	for _, i := range p.was {
		if p.will[i.SAID] == nil {
			return true
		}
	}
	return slices.ContainsFunc(p.todo, func(w *wanted) bool { return p.will[w.p.SAID] == w && !w.asItIs() })
}

// asItIs: there is nothing to do for w.
func (w *wanted) asItIs() bool {
	return w.info != nil && (!w.changed || reflect.DeepEqual(limitsOf(w.p), limitsOf(&w.info.SAParams)))
}

// place deletes what is not to be any more, makes what is new and changes what
// changes, in the transaction that is open.
func (p *saPlan) place(ctx context.Context) error {
	for _, i := range p.was {
		if w := p.will[i.SAID]; w != nil && w.info == i {
			continue
		}
		switch err := p.s.Delete(ctx, i.SAID, i.Src); {
		case errors.Is(err, syscall.ESRCH): // gone meanwhile
		case err != nil:
			return fmt.Errorf("deleting %v: %w", i.SAID, err)
		default:
			p.res.Deleted++
		}
	}
	for _, w := range p.todo {
		if p.will[w.p.SAID] != w || w.asItIs() {
			continue // deleted again, or there
		}
		var err error
		if w.info != nil {
			p.res.Changed++
			err = p.s.Update(ctx, w.p, 0)
		} else {
			p.res.Added++
			err = p.s.Add(ctx, w.p, 0)
		}
		if err != nil {
			hint := ""
			if errors.Is(err, syscall.ENOSYS) && (w.p.Encr.Legacy() || w.p.Auth.Legacy()) {
				hint = "; it takes legacy algorithms with --allow-legacy alone"
			}
			return p.message(w.pos, "missiu refused SA %v: %v%s", w.p.SAID, err, hint)
		}
	}
	return nil
}

type limits struct {
	hard, soft ipsec.Lifetime
	idle       ipsec.Idle
	encap      *ipsec.Encap
}

func limitsOf(p *ipsec.SAParams) limits { return limits{p.Hard, p.Soft, p.Idle, p.Encap} }

// WriteKeys writes SAs as a key file, with their keys: what cannot be read again
// as it is, larval SAs and those of counter-mode ciphers that have been used, are
// comments, of the latter without the keys. With hide each digit of a key is an X.
func WriteKeys(w io.Writer, sas []*keysock.SAInfo, hide bool) error {
	b := bufio.NewWriter(w)
	if hide {
		fmt.Fprintln(b, "# SAs without their keys")
	} else {
		fmt.Fprintln(b, "# SAs with their keys; read by loadConfig -k")
	}
	for _, i := range sas {
		if i.State == keysock.Larval {
			continue
		}
		spent := ipsecconf.UsesCounter(&i.SAParams) && i.Packets > 0
		line, note := ipseckey.Format(&i.SAParams, !spent && !hide)
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
func SaveSAs(name string, out io.Writer, sas []*keysock.SAInfo, hide bool) error {
	if name == "" || name == "-" {
		return WriteKeys(out, sas, hide)
	}
	if i, err := os.Lstat(name); err == nil && !i.Mode().IsRegular() {
		return fmt.Errorf("%s: not a regular file", name)
	}
	f, err := os.CreateTemp(filepath.Dir(name), ".loadConfig-*") // 0600
	if err != nil {
		return err
	}
	err = WriteKeys(f, sas, hide)
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
