/* One byte, 0xAA, on the serial port, then sleep for ever: start-up is measured up to that byte, and the processes are
 * weighed while the guest sleeps. No VMM logs such a byte to the same output. The code means the same in 32-bit and
 * in 64-bit mode, so one entry serves both boot protocols. Words of the command line: none. */

.section .note.pvh, "a", @note
    .balign 4
    .long 4, 4, 18          /* XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .long entry64

.section .text.start, "ax", @progbits
.code32
.globl entry64
entry64:
    mov $0x3f8, %edx
    mov $0xaa, %al
    outb %al, %dx
1:  cli
    hlt
    jmp 1b
.section .note.GNU-stack, "", @progbits
