// Package ipsecconf is the policy language of loadConfig: the union of Solaris
// ipsecconf and the policy scripts of NanoSec. A text becomes policies in three
// steps: tokens (pkg/config/lexer), grammar ([Parse]: an AST with positions),
// meaning ([File.Contents]: the SPD entries). Only the third knows addresses,
// names and algorithms. [Format] writes policies in the language again.
//
// Entries are tried in the order of the file, the first that matches counts.
//
//	{ raddr 192.0.2.9 ulp tcp rport 23 } ipsec { encr_algs aes encr_auth_algs sha256 }
//	{ laddr 10.1.0.0/16 raddr 10.2.0.0/16 } ipsec { encr_algs gcm tladdr 192.0.2.1 traddr 192.0.2.2 }
//	{ raddr 192.0.2.7 } ipsec { auth_algs sha256 encr_algs aes } or ipsec { auth_algs sha256 }
//	{ laddr 10.1.0.0/16 raddr 10.9.0.0/16 } ipsec { encr_algs gcm tladdr 192.0.2.1 traddr any }
//	{ lport 22 dir both } bypass {}
//
// For loadConfig.
package ipsecconf

import "github.com/missiu/missiu/pkg/config/lexer"

// File is a parsed text.
type File struct {
	Items []Item
	long  []breach // lines of more octets than Solaris takes
}

// Item is one of *Entry, *Constants, *Command.
type Item interface{ item() }

// Word is a word with its place.
type Word struct {
	Pos    lexer.Pos
	Text   string
	Quoted bool
}

// Param is a key with its value.
type Param struct{ Key, Value Word }

// Entry is { selectors } action { properties }, with more actions behind "or".
type Entry struct {
	Pos          lexer.Pos // of its brace
	Selectors    []Param
	Alternatives []Alternative
	bad          bool // an error in it was reported
	layout       []breach
	size         int // octets of its text
}

// Alternative is an action with its properties.
type Alternative struct {
	Action     Word
	Properties []Param
}

// Constants is [ name value ... ].
type Constants struct {
	Pos  lexer.Pos
	Defs []Param // the last one's value may be empty
}

// Command is a word of NanoSec's command language with its arguments.
type Command struct {
	Name Word
	Args []Word // may hold keys
}

func (*Entry) item()     {}
func (*Constants) item() {}
func (*Command) item()   {}
