// Package ipseckey reads files of manual keys in the language of Solaris'
// ipseckey(8): a command with its extensions on each line. It knows no engine;
// pkg/config/apply carries the commands out.
//
//	add esp spi 0x2112 src 10.1.2.3 dst 10.3.2.1 encr_alg aes encrkey 000102... auth_alg sha1 authkey 0102...
//	delete esp spi 0x2112 dst 10.3.2.1
//
// No message has a key in it, nor any word of a file that could be one. What an
// extension asks for and PF_KEY does not carry is an error that names it.
// Numbers are decimal, octal behind 0, hexadecimal behind 0x. Further
// extensions, which Solaris has not: reqid, mode, esn, hard_packets,
// soft_packets.
//
// For loadConfig.
package ipseckey

import (
	"io"
	"net/netip"

	"github.com/missiu/missiu/pkg/config/ipsecconf"
	"github.com/missiu/missiu/pkg/config/lexer"
	"github.com/missiu/missiu/pkg/ipsec"
)

// Verb is what a command does.
type Verb string

// Verbs.
const (
	Add        Verb = "add"
	Update     Verb = "update" // limits and UDP ports of an SA; its other extensions have to agree
	Delete     Verb = "delete"
	DeletePair Verb = "delete-pair" // an SA and the one that goes the other way
	Get        Verb = "get"
	Flush      Verb = "flush"
	Dump       Verb = "dump"
	Save       Verb = "save"
)

// Command is one command. An add, update, delete or get of a host name with
// several addresses is as many.
type Command struct {
	Pos   lexer.Pos
	Verb  Verb
	Proto ipsec.Protocol // 0: all; of flush, dump, save
	// SA is what add and update give; of delete, delete-pair and get it has the
	// SAID, and Src if it was given.
	SA ipsec.SAParams
	// Pair is the SPI of the SA that goes the other way, which has to be there;
	// 0 does not matter.
	Pair ipsec.SPI
	// File is where save writes; empty or "-": to standard output.
	File string
}

// Options are what the meaning of a file depends on.
type Options struct {
	LookupHost func(name string) ([]netip.Addr, error) // nil: no names
	// Unauthenticated takes SAs with encryption and no integrity.
	Unauthenticated bool
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
	for p.tok.Kind != lexer.EOF {
		cs = append(cs, p.command()...)
	}
	if l.Failed() {
		Wipe(cs)
		return nil, l
	}
	return cs, l
}

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
