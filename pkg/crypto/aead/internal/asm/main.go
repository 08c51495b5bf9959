// Command asm writes the assembly of crypto/aead for amd64 and its Go
// declarations. `go generate` of that package runs it, one unit at a time:
// avo keeps one file per process.
package main

import (
	"flag"
	"fmt"
	"os"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

func main() {
	unit := flag.String("unit", "", "gcm or cbc")
	ConstraintExpr("!purego")
	units := map[string]func(){"gcm": gcmUnit, "cbc": cbcUnit}
	flag.Parse()
	f, ok := units[*unit]
	if !ok {
		fmt.Fprintln(os.Stderr, "asm: -unit gcm or cbc")
		os.Exit(2)
	}
	f()
	Generate()
}

// param loads an argument of the function into a register.
func param(name string) reg.GPVirtual { return Load(Param(name), GP64()).(reg.GPVirtual) }

func mem(base reg.Register, disp int) Mem { return Mem{Base: base, Disp: disp} }

// roundTail emits the end of an AES computation for each key size: round(i)
// for the rounds above nine that the key has, of ten, twelve or fourteen in all
// less one, then last. name makes labels unique.
func roundTail(name string, rounds reg.Register, round func(i int), last func()) {
	CMPQ(rounds, Imm(12))
	JB(LabelRef(name + "Last"))
	round(10)
	round(11)
	CMPQ(rounds, Imm(12))
	JEQ(LabelRef(name + "Last"))
	round(12)
	round(13)
	Label(name + "Last")
	last()
}
