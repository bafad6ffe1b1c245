struct Mod : ModDefaults {
  static constexpr bool kScoresInLog2 = false;
};
