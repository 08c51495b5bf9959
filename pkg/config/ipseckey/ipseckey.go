// Package ipseckey reads files of manual keys in the language of Solaris'
// ipseckey(8): a command with its extensions on each line. It knows no engine;
// pkg/config/apply carries the commands out.
//
//	add esp spi 0x2112 src 10.1.2.3 dst 10.3.2.1 encr_alg aes encrkey 000102... auth_alg sha1 authkey 0102...
//	delete esp spi 0x2112 dst 10.3.2.1
//
// No message has a key in it, nor any word of a file that could be one. An
// extension that means nothing here, and does no harm by that, is passed over
// with a warning.
// Numbers are decimal, octal behind 0, hexadecimal behind 0x. Further
// extensions, which Solaris has not: reqid, mode, esn, aggfrag,
// hard_packets, soft_packets.
//
// For loadConfig.
package ipseckey

import (
	"io"
	"net/netip"
	"slices"

	"github.com/missiu/missiu/pkg/config/ipsecconf"
	"github.com/missiu/missiu/pkg/config/lexer"
	"github.com/missiu/missiu/pkg/ipsec"
)

// Verb is what a command does.
type Verb string

// Verbs.
const (
	Add        Verb = "add"
	Update     Verb = "update"      // limits and UDP ports of an SA; what else is given has to agree
	UpdatePair Verb = "update-pair" // the same, and its limits for the SA that goes the other way
	Delete     Verb = "delete"
	DeletePair Verb = "delete-pair" // an SA and the one that goes the other way
	Get        Verb = "get"
	Flush      Verb = "flush"
	Dump       Verb = "dump"
	Save       Verb = "save"
	Help       Verb = "help"
	Monitor    Verb = "monitor" // passive_monitor and pmonitor too: what comes is shown, nothing comes behind it
)

// Command is one command. An add, update, delete or get of a host name with
// several addresses is as many.
type Command struct {
	Pos   lexer.Pos
	Verb  Verb
	Proto ipsec.Protocol // 0: all; of flush, dump, save
	// SA is what add gives; of update and update-pair what was given, see Merge;
	// of delete, delete-pair and get it has the SAID, and Src if it was given.
	SA    ipsec.SAParams
	given map[string]lexer.Pos // the extensions of update
	// Pair is the SPI of the SA that goes the other way, which has to be there;
	// 0 does not matter.
	Pair ipsec.SPI
	// File is where save writes; empty or "-": to standard output.
	File string
	// HideKeys is of save: each digit of a key is an X.
	HideKeys bool
}

// Options are what the meaning of a file depends on.
type Options struct {
	LookupHost func(name string) ([]netip.Addr, error) // nil: no names
	// Unauthenticated takes SAs with encryption and no integrity.
	Unauthenticated bool
	// HideKeys has save write no keys.
	HideKeys bool
}

// MaxFile is how long a file may be, in octets.
const MaxFile = 64 << 20

// maxMessages is how many errors, and warnings, Load tells of.
const maxMessages = 100

// Load reads a file. With errors there are no commands.
func Load(file string, r io.Reader, opt Options) ([]Command, *lexer.List) {
	l := &lexer.List{File: file, Max: maxMessages}
	src, err := lexer.ReadAll(r, MaxFile)
	if err != nil {
		l.Errorf(lexer.Pos{}, "%v", err)
		return nil, l
	}
	p := &parser{lex: lexer.New(src, lexer.Syntax{Continue: true}), l: l, opt: opt, hosts: map[string][]netip.Addr{}}
	p.tok = p.lex.Next()
	var cs []Command
	for p.tok.Kind != lexer.EOF && !p.exit {
		cs = append(cs, p.command()...)
	}
	if l.Failed() {
		Wipe(cs)
		return nil, l
	}
	return cs, l
}

// Merge gives what an update makes of an SA: what it does not say stays. differs
// names an extension that asks for a change that no SA takes. The keys of the
// result are those of old.
func (c *Command) Merge(old *ipsec.SAParams) (p ipsec.SAParams, differs string) {
	p = *old
	n := &c.SA
	given := func(names ...string) bool {
		for _, name := range names {
			if c.given[name].IsValid() {
				return true
			}
		}
		return false
	}
	for _, kind := range []struct {
		name    string
		to, was *ipsec.Lifetime
	}{{"hard_", &p.Hard, &n.Hard}, {"soft_", &p.Soft, &n.Soft}} {
		if given(kind.name + "bytes") {
			kind.to.Bytes = kind.was.Bytes
		}
		if given(kind.name + "packets") {
			kind.to.Packets = kind.was.Packets
		}
		if given(kind.name + "addtime") {
			kind.to.AddTime = kind.was.AddTime
		}
		if given(kind.name + "usetime") {
			kind.to.UseTime = kind.was.UseTime
		}
	}
	if given("idle_addtime") {
		p.Idle.AddTime = n.Idle.AddTime
	}
	if given("idle_usetime") {
		p.Idle.UseTime = n.Idle.UseTime
	}
	if given("encap") {
		if old.Encap == nil {
			return p, "encap"
		}
		e := *n.Encap
		if !given("nat_rem") {
			e.OA = old.Encap.OA
		}
		p.Encap = &e
	}
	for _, x := range []struct {
		name string
		same bool
	}{
		{"reqid", n.ReqID == old.ReqID}, {"mode", n.Mode == old.Mode}, {"replay", n.ReplayWindow == old.ReplayWindow}, {"esn", n.ESN == old.ESN},
		{"replay_value", n.LastSeq == old.LastSeq}, {"aggfrag", n.AggFrag == old.AggFrag},
		{"encr_alg", n.Encr == old.Encr}, {"encrkey", n.EncrKey.Equal(old.EncrKey)},
		{"auth_alg", n.Auth == old.Auth}, {"authkey", n.AuthKey.Equal(old.AuthKey)},
	} {
		if given(x.name) && !x.same {
			return p, x.name
		}
	}
	if given(selectorKeys...) && (!slices.Equal(n.SrcTS, old.SrcTS) || !slices.Equal(n.DstTS, old.DstTS)) {
		return p, "the selector"
	}
	return p, ""
}

// selectorKeys say which packets an SA may carry.
var selectorKeys = []string{"proto", "sport", "dport", "isrc", "idst", "isport", "idport", "iproto"}

// Wipe overwrites the keys of commands.
func Wipe(cs []Command) {
	for i := range cs {
		cs[i].SA.Wipe()
	}
}

// FromPolicy gives the commands that the flush and add of a policy file are.
func FromPolicy(c *ipsecconf.Contents) []Command {
	var cs []Command
	if c.FlushSAs {
		cs = append(cs, Command{Verb: Flush})
	}
	for _, s := range c.SAs {
		cs = append(cs, Command{Pos: s.Pos, Verb: Add, SA: s.SAParams})
	}
	return cs
}

// HelpText is what the command help prints.
const HelpText = `add, update esp|ah EXTENSIONS        an SA; new limits and ports of one
update-pair esp|ah EXTENSIONS        the same, limits for the SA that goes the other way too
delete, get esp|ah spi N dst ADDRESS  an SA; delete-pair: and the one that goes the other way
flush, dump [esp|ah|all]              all SAs
save esp|ah|all [FILE]                all SAs with their keys
monitor                               key events as they come; passive_monitor, pmonitor
help, exit
`
